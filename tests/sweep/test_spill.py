"""Activations that do not fit into memory lie on disk, and what comes of them is the same to the byte."""

from pathlib import Path
from typing import Any, final

import pytest
import torch
from safetensors.torch import save_file
from transformers import T5Config, T5ForConditionalGeneration

from compress import engine
from compress.core.errors import EnvironmentFault, UsageError
from compress.core.passes import Needs
from compress.core.recipe import Recipe
from compress.models.blocks import Reentry, find_blocks
from compress.sweep.activations import Activations
from compress.sweep.spill import Kept, Shelf, Spill
from tests import models_zoo
from tests.dummies import Recorder

TENSORS = (
    torch.rand(3, 5),
    torch.rand(4, 2).bfloat16(),
    torch.rand(4, 4).T,
    torch.tensor([True, False, True]),
    torch.tensor(7),
    torch.zeros(0, 3),
)


def test_what_is_kept_comes_back_and_memory_has_a_limit(tmp_path: Path) -> None:
    spill = Spill(tmp_path / "later", limit=60)
    kept = [spill.keep(tensor) for tensor in TENSORS]
    assert spill.memory_bytes <= 60 < sum(tensor.nbytes for tensor in TENSORS)
    assert spill.file_bytes == sum(tensor.nbytes for tensor in TENSORS) - spill.memory_bytes
    for found, tensor in zip(kept, TENSORS, strict=True):
        assert (found.dtype, found.shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(found.read(), tensor)
    assert list((tmp_path / "later").iterdir()) == []


def test_without_a_limit_nothing_is_written(tmp_path: Path) -> None:
    spill = Spill(tmp_path / "never")
    assert spill.keep(TENSORS[0]).read() is TENSORS[0]
    assert not (tmp_path / "never").exists()


def test_places_are_taken_again(tmp_path: Path) -> None:
    shelf = Shelf(spill := Spill(tmp_path, limit=100))
    for turn in range(5):
        for key in range(4):
            shelf[key] = torch.full((20,), float(turn))
        assert (spill.memory_bytes, spill.file_bytes) == (80, 240)
        assert all(bool((shelf[key] == turn).all()) for key in range(4))
    # The first lies in memory in every turn, the others on disk.
    del shelf[0]
    assert spill.memory_bytes == 0
    shelf[9] = torch.zeros(25)
    assert (spill.memory_bytes, spill.file_bytes, len(shelf)) == (100, 240, 4)


def test_a_shelf_holds_tuples_with_other_values(tmp_path: Path) -> None:
    shelf = Shelf(Spill(tmp_path, limit=0))
    shelf[2] = (torch.arange(3), None)
    found, nothing = shelf[2]
    assert torch.equal(found, torch.arange(3))
    assert nothing is None
    assert isinstance(shelf.kept(2)[0], Kept)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match=r"activations do not fit into .*file"):
        Spill(tmp_path / "file", limit=0).keep(torch.zeros(3))


def test_the_file_to_resume_from_is_the_same(tmp_path: Path) -> None:
    written = {}
    for name, limit in (("memory", None), ("half", 1000), ("disk", 0)):
        activations = Activations(
            models_zoo.tokens(5, 8), 2, original=True, spill=Spill(tmp_path / name, limit)
        )
        for number, recording in enumerate([*activations.recordings, *activations.original]):
            recording.hidden[0] = torch.full((2, 8, 4), float(number))
            recording.extras[3] = (torch.full((2,), float(number)), None)
        activations.save(tmp_path / f"{name}.safetensors")
        written[name] = (tmp_path / f"{name}.safetensors").read_bytes()
        again = Activations(models_zoo.tokens(5, 8), 2, original=True, spill=Spill(tmp_path / name, limit))
        again.restore(tmp_path / f"{name}.safetensors")
        assert float(again.original[2].hidden[0][1, 7, 3]) == 5.0
        assert again.recordings[1].extras[3][1] is None
    assert written["memory"] == written["half"] == written["disk"]


def test_two_stacks_and_a_shared_bias_lie_on_disk(tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=models_zoo.VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    model = T5ForConditionalGeneration(config).eval()
    blocks = find_blocks(model)
    said = []
    for limit in (None, 0):
        activations = Activations(models_zoo.tokens(4, 8), 2, spill=(spill := Spill(tmp_path, limit)))
        with Reentry(model, blocks, torch.device("cpu")) as reentry:
            for batch, recording in zip(activations.batches, activations.recordings, strict=True):
                for block in blocks:
                    reentry.advance(block.position, batch, recording)
                assert sorted(recording.hidden) == [0, 1]
                assert len(recording.extras) > 0
                said.append(reentry.run(len(blocks), batch, recording).logits)
        assert (spill.file_bytes > 0) == (limit == 0)
    assert torch.equal(torch.cat(said[:2]), torch.cat(said[2:]))


class Stopped(Exception):
    """Stands for a crash."""


@final
class Stopping(Recorder):
    """Stops the run when the second block goes on."""

    def event(self, name: str, **facts: object) -> None:
        super().event(name, **facts)
        if (name, facts.get("position")) == ("block.advance", 1):
            raise Stopped


GPTQ = {"use": "quantize.gptq", "group_size": 16}
ROUNDED: dict[str, Any] = {"use": "quantize.autoround", "bits": 2, "group_size": 16, "iterations": 3}


def recipe(model: str, folder: Path, step: dict[str, Any], memory: str) -> Recipe:
    if not (folder / "tokens.safetensors").is_file():
        save_file({"input_ids": models_zoo.tokens(8, 16)}, folder / "tokens.safetensors")
        models_zoo.write(model, folder)
    data = {"calibration": str(folder / "tokens.safetensors"), "samples": 8, "sequence_length": 16}
    data |= {"batch_size": 2, "activations_memory": memory}
    return Recipe.of({"model": str(folder / model), "threads": 1, "data": data, "steps": [step]})


def same(one: Path, other: Path) -> None:
    files = [*sorted(one.glob("*.safetensors")), one / "compress.json", one / "compress.layers.csv"]
    for file in files[:-1]:
        assert file.read_bytes() == (other / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("model", "step"),
    [
        ("llama", ROUNDED),
        ("mixtral", {"use": "prune.wanda", "sparsity": 0.5}),
        ("qwen2-moe", GPTQ),
        ("opt", {"use": "prune.depth", "keep": 0.7}),
        ("gemma2", {"use": "transform.smoothquant"}),
    ],
)
def test_the_result_is_the_same_to_the_byte(model: str, step: dict[str, Any], tmp_path: Path) -> None:
    recorder = Recorder()
    held = engine.run(recipe(model, tmp_path, step, "1GB"), tmp_path / "held", single=True).final
    asked = recipe(model, tmp_path, step, "2KB")
    spilled = engine.run(asked, tmp_path / "spilled", single=True, reporter=recorder).final
    same(held, spilled)
    # Asked again with another limit, it is done already: the limit is no part of what is computed.
    assert engine.plan(recipe(model, tmp_path, step, "3KB"), tmp_path / "spilled", single=True).already_done


def test_a_run_with_activations_on_disk_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole = engine.run(recipe("llama", tmp_path, ROUNDED, "1GB"), tmp_path / "whole", single=True).final
    asked = recipe("llama", tmp_path, ROUNDED, "0B")
    with pytest.raises(Stopped):
        engine.run(asked, tmp_path / "stopped", single=True, reporter=Stopping())
    recorder = Recorder()
    resumed = engine.run(asked, tmp_path / "stopped", single=True, reporter=recorder).final
    assert recorder.count("block.resume") == 1
    same(whole, resumed)


def test_the_plan_says_what_will_lie_on_disk(tmp_path: Path) -> None:
    recorder = Recorder()
    held = engine.plan(
        recipe("llama", tmp_path, ROUNDED, "1GB"), tmp_path / "out", single=True, reporter=recorder
    )
    assert not any("activations" in message for message in recorder.messages)
    asked = recipe("llama", tmp_path, ROUNDED, "2048B")
    spilling = engine.plan(asked, tmp_path / "out", single=True, reporter=recorder)
    # Two streams of 8 sequences of 16 positions, 32 float32 wide.
    streams = 2 * 8 * 16 * 32 * 4
    (before,), (after,) = held.describe(), spilling.describe()
    assert after["spilled_bytes"] == streams - 2048
    assert (
        after["disk_bytes"] - before["disk_bytes"]
        == before["host_bytes"] - after["host_bytes"]
        == streams - 2048
    )
    assert any("calibration activations stay in memory" in message for message in recorder.messages)


def test_a_limit_is_a_number_with_a_unit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"activations_memory.*such as 2GB"):
        engine.plan(recipe("llama", tmp_path, ROUNDED, "much"), tmp_path / "out")


def test_needs_within_a_limit() -> None:
    needs = Needs(100, 1000, 0, 1.0, activation_bytes=400)
    assert needs.within(None) is needs
    assert needs.within(400) is needs
    assert needs.within(150) == Needs(350, 750, 0, 1.0, activation_bytes=150, spilled_bytes=250)
