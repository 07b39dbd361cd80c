"""Depth pruning on every architecture: the files hold the model with the removed blocks passed by."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress import engine
from compress.core.artifact import Artifact
from compress.core.errors import PlanError, VerificationError
from compress.core.run import CalibrationSource, Run
from compress.models.blocks import find_blocks
from compress.prune.depth import Depth
from compress.sweep.narrow_model import NarrowModel
from tests import models_zoo
from tests.depth_models import going, prune, without
from tests.marks import slow_but
from tests.single_steps import (
    LENGTH,
    SAMPLES,
    calibration,
    decisions,
    killed_and_resumed,
    loaded,
    outputs,
    recipe_of,
    tensors,
)

MOVING = tuple(name for name in models_zoo.CONFIGURATIONS if name != "albert")
WITHOUT_FIRST = tuple(name for name in MOVING if name != "modernbert")
STANDING_FOR_OTHERS = ("llama", "gpt2", "gpt-oss", "modernbert")
SLOW = pytest.mark.slow


def check_function(source: Path, out: Artifact, gone: Sequence[int]) -> None:
    small, big = loaded(out.path), loaded(source)
    assert len(find_blocks(small)) == 3 - len(gone)
    whole = outputs(big)
    expected = outputs(without(big, gone))
    assert float((outputs(small) - expected).abs().max()) <= 1e-5
    # Something went, so the model as it was says something else.
    assert float((whole - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("name", slow_but(STANDING_FOR_OTHERS, MOVING))
def test_it_computes_what_the_big_model_does_without_a_block_in_the_middle(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going(monkeypatch, 1)
    source = models_zoo.write(name, tmp_path)
    out = prune(source, tmp_path / "out")
    check_function(source, out, [1])
    said = decisions(out)
    assert said["blocks"] == {"of": 3, "got": 2, "gone": "1", "by": "influence"}
    before, after = tensors(source), tensors(out.path)
    assert said["parameters"]["before"] == sum(tensor.numel() for tensor in before.values())
    assert said["parameters"]["after"] == sum(tensor.numel() for tensor in after.values())
    assert out.lineage is not None
    assert set(out.lineage.tensors) == set(after)
    assert sum(meant.changed for meant in out.lineage.tensors.values()) == said["changed"]


@pytest.mark.parametrize("name", slow_but(("gemma2", "mixtral", "bert"), WITHOUT_FIRST))
def test_it_computes_what_the_big_model_does_without_its_first_block(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going(monkeypatch, 0)
    source = models_zoo.write(name, tmp_path)
    check_function(source, prune(source, tmp_path / "out"), [0])


def test_two_blocks_at_the_start_may_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    going(monkeypatch, 0, 1)
    source = models_zoo.write("gemma2", tmp_path)
    check_function(source, prune(source, tmp_path / "out", layers=1), [0, 1])


def test_what_stays_is_the_same_to_the_bit_in_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going(monkeypatch, 1)
    source = models_zoo.write("llama", tmp_path, dtype=torch.bfloat16)
    out = prune(source, tmp_path / "out")
    before, after = tensors(source), tensors(out.path)
    for name, tensor in after.items():
        old = name.replace(".layers.1.", ".layers.2.")
        assert tensor.dtype == before[old].dtype
        assert torch.equal(tensor, before[old])
    assert out.lineage is not None
    changed = {name for name, meant in out.lineage.tensors.items() if meant.changed}
    assert changed == {name for name in after if ".layers.1." in name}
    assert all(meant.error == 0 for meant in out.lineage.tensors.values())


def test_a_block_that_computes_by_its_number_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going(monkeypatch, 1)
    run = NarrowModel.run

    def other(self: Any, position: int, weights: Any, batch: Any, recording: Any) -> Any:
        factor = 1.0 + 0.1 * position
        return run(self, position, {name: w * factor for name, w in weights.items()}, batch, recording)

    monkeypatch.setattr(NarrowModel, "run", other)
    with pytest.raises(VerificationError, match=r"layers\.2 as model\.layers\.1 is .* in its old place"):
        prune(models_zoo.write("llama", tmp_path), tmp_path / "out")


@SLOW
def test_it_may_be_followed_by_others_and_generates(tmp_path: Path) -> None:
    recipe = recipe_of("prune.depth", models_zoo.write("qwen2-sliding", tmp_path), tmp_path, keep=0.67)
    recipe["steps"] += [
        {"use": "prune.width", "mlp": 0.5, "heads": 1.0},
        {"use": "quantize.rtn", "group_size": 16},
    ]
    final = engine.run(recipe, tmp_path / "out").final
    config = json.loads((final / "config.json").read_text(encoding="utf-8"))
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 32)
    assert len(config["layer_types"]) == 2
    out = prune(models_zoo.write("llama", tmp_path), tmp_path / "again" / "out", layers=1)
    said = loaded(out.path).generate(
        models_zoo.tokens(1, 4), max_new_tokens=3, do_sample=False, eos_token_id=-1
    )
    assert said.shape == (1, 7)


# -- resuming and refusing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "number", "options"),
    [
        pytest.param("block.calibrate", 3, {"contiguous": True}, marks=SLOW),
        pytest.param("block.finish", 3, {}, marks=SLOW),
        pytest.param("shard.tensor", 14, {}, marks=SLOW),
        ("shard.tensor", 14, {"repair": True}),
        pytest.param("layer.solve", 1, {"repair": True}, marks=SLOW),
        pytest.param("block.finish", 5, {"repair": True}, marks=SLOW),
        ("depth.measure", 3, {"by": "loss"}),
        pytest.param("artifact.rename", 1, {}, marks=SLOW),
    ],
)
def test_a_run_that_is_killed_resumes_to_the_same_bytes(
    event: str, number: int, options: dict[str, Any], tmp_path: Path
) -> None:
    recipe = recipe_of("prune.depth", models_zoo.write("qwen3", tmp_path), tmp_path, **options)
    again = killed_and_resumed(recipe, tmp_path, event, number)
    if options.get("by") == "loss":
        # Three blocks alone: two were measured.
        assert again.count("depth.measure") == 1
    else:
        # Three blocks are scanned; two and what lies outside them are written.
        assert again.count("block.resume") > 0
        assert again.count("block.resume") + again.count("block.start") == 6


def test_one_block_and_no_block_less_are_refused(tmp_path: Path) -> None:
    run = Run(calibration=CalibrationSource(calibration(tmp_path)["calibration"]))
    with pytest.raises(PlanError, match="has one block"):
        Depth().check(Artifact.open(models_zoo.write("albert", tmp_path)), run)
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    with pytest.raises(PlanError, match="nothing would be taken out"):
        Depth(keep=1.0).check(source, run)
    with pytest.raises(PlanError, match="nothing would be taken out"):
        Depth(layers=3).check(source, run)


def test_calibration_text_is_needed(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    with pytest.raises(PlanError, match="needs calibration text"):
        Depth().check(source, Run())


def test_what_it_takes_is_predicted(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    run = Run(calibration=CalibrationSource(calibration(tmp_path)["calibration"], SAMPLES, LENGTH, 2))
    plain = Depth().check(source, run)
    repaired = Depth(repair=True).check(source, run)
    bytes_ = sum(tensor.nbytes for tensor in tensors(source.path).values())
    assert 0 < plain.disk_bytes < bytes_ + 2 * 4 * SAMPLES * LENGTH * 32
    assert repaired.disk_bytes > plain.disk_bytes
    assert repaired.host_bytes > plain.host_bytes
    assert Depth(by="loss").check(source, run).seconds > 0


# -- a model that has learned something ------------------------------------------------------------------


@SLOW
def test_a_trained_model_loses_little_and_the_repair_wins_some_of_it_back(
    shared: Path, tmp_path: Path
) -> None:
    folder = shared / "models" / "gutenberg-4m"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = (shared / "data" / "wikitext2_valid.txt").read_text(encoding="utf-8")[:40_000]
    tokens = torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"][:4096]).view(-1, 256)

    def loss(model: Any) -> float:
        with torch.no_grad():
            return float(model.float()(input_ids=tokens, labels=tokens).loss)

    def cut(name: str, **options: Any) -> Artifact:
        text = {"calibration": str(shared / "data" / "gutenberg_train.txt.gz"), "samples": 64}
        recipe = {
            "model": str(folder),
            "steps": [{"use": "prune.depth", "layers": 3, **options}],
            "data": {**text, "sequence_length": 256},
            "threads": 1,
            "device": "cpu",
        }
        return Artifact.open(engine.run(recipe, tmp_path / name, single=True).final)

    plain, repaired = cut("loss", by="loss"), cut("repaired", by="loss", repair=True)
    every = [loss(without(loaded(folder), [number])) for number in range(4)]
    assert loss(loaded(plain.path)) == pytest.approx(min(every), rel=0.02)
    assert loss(loaded(folder)) < loss(loaded(repaired.path)) < loss(loaded(plain.path))
