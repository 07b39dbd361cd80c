"""Repairs of depth pruning, against ridge regression of the whole model's hidden states."""

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.run import CalibrationSource, Run
from compress.numerics.least_squares import LAYERS_RIDGE
from compress.prune.depth import Depth
from compress.sweep import shortening
from compress.sweep.depth_choice import Judgement
from tests import models_zoo
from tests.depth_models import five_layers, going, prune
from tests.dummies import Recorder
from tests.marks import slow_but
from tests.single_steps import LENGTH, calibration, decisions, loaded, outputs, tensors

REPAIRED = ("llama", "gpt2", "gpt-neox", "phi", "opt", "qwen2-sliding")


def distance(model: Any, wanted: torch.Tensor, tokens: torch.Tensor) -> float:
    return float((outputs(model, tokens) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", slow_but(("llama",), REPAIRED))
def test_the_repair_brings_outputs_on_other_tokens_nearer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going(monkeypatch, 1)
    source = models_zoo.write(name, tmp_path)
    plain = prune(source, tmp_path / "plain" / "out", samples=96)
    repaired = prune(source, tmp_path / "repaired" / "out", samples=96, repair=True)
    other = models_zoo.tokens(32, LENGTH, seed=11)
    wanted = outputs(loaded(source), other)
    assert distance(loaded(repaired.path), wanted, other) < distance(loaded(plain.path), wanted, other)
    rows = [row for row in decisions(repaired)["layers"].values() if "repaired" in row]
    # The block in front of the gap and the one behind it.
    assert len(rows) == 2
    assert all(float(row["repaired_error"]) < float(row["error"]) for row in rows)
    before, after = tensors(plain.path), tensors(repaired.path)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert {part.rpartition(".")[0].partition(f"{rows[0]['repaired']}")[1] for part in moved} == {
        rows[0]["repaired"]
    }


def test_blocks_in_front_of_the_first_gap_are_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going(monkeypatch, 2)
    source = five_layers(tmp_path)
    out = prune(source, tmp_path / "out", samples=48, layers=4, repair=True)
    rows = decisions(out)["layers"]
    repaired = [number for number in range(5) if "repaired" in rows[f"model.layers.{number}"]]
    assert repaired == [1, 3, 4]
    before, after = tensors(source), tensors(out.path)
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(before[name], after[name])


def test_the_first_repair_is_the_ridge_regression_of_what_the_gap_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going(monkeypatch, 1)
    source = models_zoo.write("llama", tmp_path)
    out = prune(source, tmp_path / "out", samples=48, repair=True)
    model = loaded(source)
    inputs: list[torch.Tensor] = []
    layers = model.model.layers
    layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    hidden: list[torch.Tensor] = []
    for layer in layers[:2]:
        layer.register_forward_hook(lambda _module, _args, output: hidden.append(output))
    outputs(model, models_zoo.tokens(48, LENGTH))
    wanted = hidden[1].flatten(0, 1).double()
    share = 1 / wanted.norm(dim=1, keepdim=True)
    left = inputs[0].flatten(0, 1).double() * share
    right = (wanted - hidden[0].flatten(0, 1).double()) * share
    gram = left.T @ left
    system = gram + LAYERS_RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).double()
    expected = layers[0].mlp.down_proj.weight.detach().double() + torch.linalg.solve(system, left.T @ right).T
    found = tensors(out.path)["model.layers.0.mlp.down_proj.weight"].double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_text_of_few_tokens_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judgement = Judgement((1,), "influence", {}, {}, 2 * LENGTH)
    monkeypatch.setattr(shortening, "_judged", lambda *_: judgement)
    recorder = Recorder()
    prune(models_zoo.write("llama", tmp_path), tmp_path / "out", recorder, samples=2, repair=True)
    assert any("fewer calibration tokens than they have inputs" in message for message in recorder.messages)


@pytest.mark.parametrize(
    "name", slow_but(("bert", "gemma2", "mixtral"), ("bert", "gemma2", "gemma3", "mixtral", "qwen2-moe"))
)
def test_a_repair_is_refused_where_no_layer_can_carry_it(name: str, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write(name, tmp_path))
    run = Run(calibration=CalibrationSource(calibration(tmp_path)["calibration"]))
    Depth().check(source, run)
    with pytest.raises(PlanError, match="there is nothing to repair a cut with"):
        Depth(repair=True).check(source, run)
