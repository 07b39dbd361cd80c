"""Repairs of width pruning, against least squares on what the layers of the whole model read."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.core.artifact import Artifact
from compress.core.run import CalibrationSource, Run
from compress.numerics.least_squares import COLUMNS_RIDGE
from compress.prune.width import Width
from tests import models_zoo
from tests.dummies import Recorder
from tests.marks import slow_but
from tests.single_steps import (
    LENGTH,
    applied,
    calibration,
    decisions,
    killed_and_resumed,
    loaded,
    numbers,
    outputs,
    recipe_of,
    tensors,
)

SAMPLES = 96

prune = partial(applied, "prune.width", samples=SAMPLES, keep=0.5)


def matrix(model: Any, name: str) -> torch.Tensor:
    """The weight of a layer, ``[rows, columns]``, whichever way it lies."""
    module = model.get_submodule(name)
    weight: torch.Tensor = module.weight.detach().double()
    return weight.T if type(module).__name__ == "Conv1D" else weight


def read(model: Any, names: list[str]) -> dict[str, torch.Tensor]:
    """What layers read on the calibration tokens, ``[tokens, columns]``."""
    seen: dict[str, torch.Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2).double())
        )
    outputs(model, models_zoo.tokens(SAMPLES, LENGTH))
    return seen


@pytest.mark.parametrize("name", slow_but(("llama", "gpt2"), ("llama", "gpt2", "opt", "bert", "gemma2")))
def test_layers_that_lost_inputs_are_fitted_to_their_outputs_before(name: str, tmp_path: Path) -> None:
    source = models_zoo.write(name, tmp_path)
    out = prune(source, tmp_path / "out", repair=True)
    big, small = loaded(source), loaded(out.path)
    rows = decisions(out)["layers"]
    seen = read(big, list(rows))
    for layer, row in rows.items():
        width = seen[layer].shape[1] // row["parts"]
        kept = [number * width + place for number in numbers(row["kept"]) for place in range(width)]
        inputs, weight = seen[layer], matrix(big, layer)
        bias = big.get_submodule(layer).bias
        one = torch.ones_like(inputs[:, :1])
        left = inputs[:, kept] if bias is None else torch.cat([inputs[:, kept], one], dim=1)
        gone = [column for column in range(inputs.shape[1]) if column not in kept]
        lost = inputs[:, gone] @ weight[:, gone].T
        size = COLUMNS_RIDGE * float(inputs[:, kept].square().sum(0).mean())
        ridge = torch.full((left.shape[1],), size).double()
        if bias is not None:
            ridge[-1] = 0
        change = torch.linalg.solve(left.T @ left + ridge.diag(), left.T @ lost).T
        expected = weight[:, kept] + change[:, : len(kept)]
        torch.testing.assert_close(matrix(small, layer), expected, rtol=1e-3, atol=1e-4)
        if bias is not None:
            found = small.get_submodule(layer).bias.detach().double()
            torch.testing.assert_close(found, bias.detach().double() + change[:, -1], rtol=1e-3, atol=1e-4)
        whole = (inputs @ weight.T).norm()
        assert float(row["error"]) == pytest.approx(float(lost.norm() / whole), rel=1e-3)
        assert float(row["repaired_error"]) < float(row["error"])


def distance(model: Any, wanted: torch.Tensor, tokens: torch.Tensor) -> float:
    return float((outputs(model, tokens) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", slow_but(("llama",), ("llama", "gpt2", "phi", "bert")))
def test_outputs_on_other_tokens_come_nearer_and_the_same_channels_stay(name: str, tmp_path: Path) -> None:
    source = models_zoo.write(name, tmp_path)
    plain = prune(source, tmp_path / "plain" / "out")
    repaired = prune(source, tmp_path / "repaired" / "out", repair=True)
    other = models_zoo.tokens(32, LENGTH, seed=11)
    wanted = outputs(loaded(source), other)
    assert distance(loaded(repaired.path), wanted, other) < distance(loaded(plain.path), wanted, other)
    rows = decisions(plain)["layers"]
    again = decisions(repaired)["layers"]
    assert {layer: row["kept"] for layer, row in rows.items()} == {
        layer: row["kept"] for layer, row in again.items()
    }
    before, after = tensors(plain.path), tensors(repaired.path)
    moved = {key.rpartition(".")[0] for key in after if not torch.equal(before[key], after[key])}
    assert all(any(layer.endswith(key) or key.endswith(layer) for layer in rows) for key in moved)
    assert len(moved) == len(rows)


@pytest.mark.slow
def test_half_precision_is_kept_and_what_moved_is_said(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path, dtype=torch.bfloat16)
    plain = prune(source, tmp_path / "plain" / "out")
    repaired = prune(source, tmp_path / "repaired" / "out", repair=True)
    assert plain.lineage is not None
    assert repaired.lineage is not None
    assert {tensor.dtype for tensor in tensors(repaired.path).values()} == {torch.bfloat16}
    name = "model.layers.1.mlp.down_proj.weight"
    assert repaired.lineage.tensors[name].error > plain.lineage.tensors[name].error > 0
    other = "model.layers.1.mlp.up_proj.weight"
    assert repaired.lineage.tensors[other] == plain.lineage.tensors[other]


def test_a_text_of_few_tokens_is_named(tmp_path: Path) -> None:
    recorder = Recorder()
    prune(models_zoo.write("llama", tmp_path), tmp_path / "out", recorder, samples=1, repair=True)
    assert any("fewer calibration tokens than they have inputs" in message for message in recorder.messages)


def test_a_run_that_is_killed_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    recipe = recipe_of(
        "prune.width", models_zoo.write("qwen3", tmp_path), tmp_path, SAMPLES, keep=0.5, repair=True
    )
    killed_and_resumed(recipe, tmp_path, "layer.solve", 4)


def test_a_repair_is_predicted_to_take_more(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    run = Run(calibration=CalibrationSource(calibration(tmp_path)["calibration"], 8, LENGTH, 2))
    plain, repaired = Width().check(source, run), Width(repair=True).check(source, run)
    assert repaired.host_bytes > plain.host_bytes
    assert repaired.disk_bytes == plain.disk_bytes
