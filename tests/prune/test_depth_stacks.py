"""Depth pruning of encoder-decoders: each stack loses blocks of its own, and the rest is what it was."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress import engine
from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.run import CalibrationSource, Run
from compress.models.blocks import find_blocks
from compress.prune.depth import Depth
from tests import models_zoo
from tests.depth_models import going, prune, without
from tests.dummies import Killed, KillingRecorder, Recorder
from tests.marks import slow_but
from tests.single_steps import (
    LENGTH,
    SAMPLES,
    calibration,
    decisions,
    loaded,
    outputs,
    recipe_of,
    tensors,
)

GOING = {
    "t5": (1, 5),
    "t5-gated": (1, 3, 6),
    "umt5": (0, 2, 4),
    "bart": (0, 3, 5),
    "mbart": (0, 2, 5, 7),
    "pegasus": (1, 3, 6),
    "t5gemma": (1, 3, 5),
}
"""Blocks that go, over both stacks: first, middle and last ones, neighbours too."""
SLOW = pytest.mark.slow


def paths(source: Path, numbers: Sequence[int]) -> set[str]:
    blocks = find_blocks(loaded(source))
    return {blocks[number].name for number in numbers}


def stays(source: Path, gone: Sequence[int]) -> list[int]:
    """How many blocks of each stack stay."""
    stacks = [block.stack for block in find_blocks(loaded(source)) if block.position not in gone]
    return [stacks.count(0), stacks.count(1)]


def gone_of(artifact: Artifact) -> set[str]:
    return {name for name, row in decisions(artifact)["layers"].items() if row["becomes"] == ""}


def divergence(source: Path, other: Any, tokens: torch.Tensor) -> float:
    """Of what a model says from what the source says, over all positions."""
    wanted, said = (outputs(model, tokens).log_softmax(-1) for model in (loaded(source), other))
    return float((wanted.exp() * (wanted - said)).sum(-1).mean())


@pytest.mark.parametrize("name", slow_but(("t5", "bart"), GOING))
def test_it_computes_what_the_big_model_does_without_these_blocks_and_generates(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going(monkeypatch, *GOING[name])
    source = models_zoo.write(name, tmp_path)
    numbers = stays(source, GOING[name])
    out = prune(source, tmp_path / "out", layers=numbers)
    big, small = loaded(source), loaded(out.path)
    whole = outputs(big)
    expected = outputs(without(big, GOING[name]))
    assert float((outputs(small) - expected).abs().max()) <= 1e-5
    assert float((whole - expected).abs().max()) > 1e-3
    assert gone_of(out) == paths(source, GOING[name])
    said = decisions(out)
    assert (said["blocks"]["of"], said["blocks"]["got"]) == (len(find_blocks(big)), sum(numbers))
    counts = [value for value in said["config"].values() if isinstance(value, int)]
    sizes = stays(source, [])
    assert sorted(counts) == sorted(n for n, size in zip(numbers, sizes, strict=True) if n != size)
    assert said["parameters"]["after"] == sum(entry.numel() for entry in small.parameters())
    assert out.lineage is not None
    assert set(out.lineage.tensors) == set(tensors(out.path))
    writer = transformers.AutoModelForSeq2SeqLM.from_pretrained(out.path)
    prompt = {"input_ids": models_zoo.tokens(2, 6), "min_new_tokens": 4, "max_new_tokens": 4}
    cached, plain = (writer.generate(**prompt, do_sample=False, use_cache=use) for use in (True, False))
    assert cached.shape == (2, 5)
    assert torch.equal(cached, plain)


def test_the_share_is_of_each_stack_and_the_block_with_the_bias_stays_and_is_named(tmp_path: Path) -> None:
    source = models_zoo.write("t5", tmp_path)
    reporter = Recorder()
    out = prune(source, tmp_path / "out", reporter, keep=0.4)
    small = loaded(out.path)
    assert [block.name for block in find_blocks(small)] == ["encoder.block.0", "decoder.block.0"]
    rows = decisions(out)["layers"]
    assert rows["encoder.block.0"]["becomes"] == "encoder.block.0"
    # With two blocks gone it is known what the third one does too.
    assert all(float(row["influence"]) > 0 for row in rows.values())
    messages = " ".join(reporter.messages)
    assert "decoder.block.0 stays: it alone has layer.0.SelfAttention.relative_attention_bias" in messages
    expected = outputs(without(loaded(source), [1, 2, 4, 5]))
    assert float((outputs(small) - expected).abs().max()) <= 1e-5


def test_one_stack_alone_may_lose_blocks(tmp_path: Path) -> None:
    source = models_zoo.write("bart", tmp_path)
    out = prune(source, tmp_path / "out", layers=[4, 1], contiguous=True)
    said = decisions(out)
    assert said["config"] == {"decoder_layers": 1}
    assert said["blocks"]["gone"].startswith("model.decoder.layers ")
    assert set(said["windows"]) == {"model.decoder.layers 0", "model.decoder.layers 1"}


@pytest.mark.parametrize("name", slow_but(("t5",), ("t5", "mbart")))
def test_a_decoder_is_judged_by_how_far_its_words_move(name: str, tmp_path: Path) -> None:
    source = models_zoo.write(name, tmp_path)
    # The last batch is a smaller one.
    out = prune(source, tmp_path / "out", samples=5, by="loss", layers=2)
    tokens = models_zoo.tokens(5, LENGTH)
    rows = decisions(out)["layers"]
    for block in find_blocks(loaded(source)):
        expected = divergence(source, without(loaded(source), [block.position]), tokens)
        assert float(rows[block.name]["loss"]) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert rows[block.name]["tokens"] == 5 * LENGTH


def test_neighbours_of_each_stack_are_measured_together(tmp_path: Path) -> None:
    source = models_zoo.write("bart", tmp_path)
    said = decisions(prune(source, tmp_path / "out", by="loss", layers=[2, 2], contiguous=True))
    windows = {
        "model.encoder.layers 0": [0, 1],
        "model.encoder.layers 2": [2, 3],
        "model.decoder.layers 1": [5],
    }
    assert len(said["windows"]) == 6
    for name, gone in windows.items():
        expected = divergence(source, without(loaded(source), gone), models_zoo.tokens(SAMPLES, LENGTH))
        assert float(said["windows"][name]) == pytest.approx(expected, rel=1e-3)


def test_what_is_left_is_repaired_where_its_last_layer_can_be_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going(monkeypatch, 1, 5)
    source = models_zoo.write("t5", tmp_path)
    plain = prune(source, tmp_path / "a" / "out", samples=48, layers=2)
    repaired = prune(source, tmp_path / "b" / "out", samples=48, layers=2, repair=True)
    rows = decisions(repaired)["layers"]
    fitted = {name for name, row in rows.items() if "repaired" in row}
    assert fitted == {"encoder.block.0", "encoder.block.2", "decoder.block.0", "decoder.block.1"}
    assert {rows[name]["repaired"] for name in fitted} <= {
        "layer.1.DenseReluDense.wo",
        "layer.2.DenseReluDense.wo",
    }
    assert all(float(rows[name]["repaired_error"]) < float(rows[name]["error"]) for name in fitted)
    tokens = models_zoo.tokens(48, LENGTH)
    lost = [divergence(source, loaded(out.path), tokens) for out in (plain, repaired)]
    assert lost[1] < lost[0]


def test_a_repair_behind_a_norm_is_refused_by_the_plan(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("bart", tmp_path))
    run = Run(calibration=CalibrationSource(calibration(tmp_path)["calibration"]))
    with pytest.raises(PlanError, match=r"no linear layer of model\.encoder\.layers\.0 adds to the hidden"):
        Depth(layers=2, repair=True).check(source, run)
    with pytest.raises(PlanError, match="1 numbers of blocks for 2 stacks"):
        Depth(layers=(2,)).check(source, run)


@pytest.mark.parametrize(
    ("event", "number", "options"),
    [
        pytest.param("block.calibrate", 5, {"contiguous": True}, marks=SLOW),
        ("shard.tensor", 40, {"repair": True}),
        pytest.param("block.finish", 9, {"repair": True}, marks=SLOW),
        pytest.param("depth.measure", 5, {"by": "loss"}, marks=SLOW),
    ],
)
def test_a_run_that_is_killed_resumes_to_the_same_bytes(
    event: str, number: int, options: dict[str, Any], tmp_path: Path
) -> None:
    recipe = recipe_of("prune.depth", models_zoo.write("t5", tmp_path), tmp_path, layers=2, **options)
    whole = engine.run(recipe, tmp_path / "whole", single=True).final
    with pytest.raises(Killed):
        engine.run(recipe, tmp_path / "out", single=True, reporter=KillingRecorder(event, number))
    again = Recorder()
    resumed = engine.run(recipe, tmp_path / "out", single=True, reporter=again).final
    assert again.count("block.resume") > 0 or again.count("depth.measure") > 0
    for file in sorted(whole.iterdir()):
        if file.name != "compress.run.json":
            assert (resumed / file.name).read_bytes() == file.read_bytes(), file.name


@SLOW
def test_vectors_are_enough_and_the_head_stays(tmp_path: Path) -> None:
    """Asked for as an encoder of texts, an encoder-decoder keeps a head that nothing reads."""
    source = models_zoo.write("mbart", tmp_path)
    recipe = recipe_of("prune.depth", source, tmp_path, layers=2, by="loss") | {"task": "feature-extraction"}
    out = Artifact.open(engine.run(recipe, tmp_path / "out", single=True).final)
    assert torch.equal(tensors(out.path)["lm_head.weight"], tensors(source)["lm_head.weight"])
    assert stays(out.path, []) == [2, 2]
