"""A student of another shape: an ordinary model of the teacher's class, with the teacher's weights in it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from compress import engine
from compress.core.artifact import Lineage
from compress.core.errors import PlanError
from compress.core.recipe import Recipe
from compress.sweep.reshaping import _cut, _evenly
from tests import models_zoo
from tests.marks import slow_but

HIDDEN = {"opt": 24, "gpt-neox": 32, "phi": 32}
"""Widths that these classes can have; 16 is for all others."""
DECODERS = ["llama", "llama-tied", "qwen2-sliding", "qwen3", "gemma2", "gpt2", *HIDDEN]


def made(source: Path, out: Path, **options: Any) -> Any:
    step = {"use": "distill.student", **options}
    engine.run(
        Recipe.of({"model": str(source), "threads": 1, "device": "cpu", "steps": [step]}), out, single=True
    )
    lineage = Lineage.read(out)
    assert lineage is not None
    return lineage.steps[-1].decisions


@pytest.mark.parametrize(
    "name", slow_but(("llama-tied", "gemma2", "gpt2", "bert"), [*DECODERS, "bert", "modernbert"])
)
def test_it_is_a_model_of_the_class_in_the_shape_that_was_asked_for(name: str, tmp_path: Path) -> None:
    source = models_zoo.write(name, tmp_path, dtype=torch.bfloat16)
    width = HIDDEN.get(name, 16)
    told = made(source, tmp_path / "out", layers=2, hidden=width)
    assert told["taken_from"] == [0, 2]
    kind = AutoModel if name in models_zoo.ENCODERS else AutoModelForCausalLM
    model, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.num_hidden_layers == 2
    assert model.config.hidden_size == width
    assert sum(weight.numel() for weight in model.parameters()) == told["parameters"]["after"]
    with torch.no_grad():
        assert torch.isfinite(model(models_zoo.tokens(2, 8))[0]).all()


def test_fewer_layers_are_whole_layers_of_the_teacher(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    made(source, tmp_path / "out", layers=2)
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    for name, weight in after.items():
        old = name.replace("layers.1.", "layers.2.")
        assert torch.equal(weight, before[old]), name
    assert "model.layers.2.mlp.up_proj.weight" not in after


def test_channels_are_the_same_wherever_they_come(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    told = made(source, tmp_path / "out", hidden=16, mlp=32)
    assert told["config"]["intermediate_size"] == 32
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    even = torch.arange(16) * 2
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(after[name], before[name][torch.arange(32) * 2][:, even])
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(after[name], before[name][even][:, torch.arange(32) * 2])
    # Heads stay as many and as wide.
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(after[name], before[name][:, even])
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"][even])


def test_fresh_weights_are_drawn_by_the_seed(tmp_path: Path) -> None:
    source = models_zoo.write("gpt2", tmp_path)
    for name in ("one", "two"):
        made(source, tmp_path / name, layers=1, weights="fresh")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    matrix = one["transformer.h.0.mlp.c_fc.weight"]
    assert float(matrix.std()) == pytest.approx(0.02, rel=0.1)


def test_fresh_weights_may_have_the_shape_that_is_there(tmp_path: Path) -> None:
    source = models_zoo.write("llama-tied", tmp_path)
    told = made(source, tmp_path / "out", weights="fresh")
    assert told["parameters"]["before"] == told["parameters"]["after"]
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    assert {name: weight.shape for name, weight in before.items()} == {
        name: weight.shape for name, weight in after.items()
    }
    assert not any(torch.equal(before[name], after[name]) for name in before if before[name].dim() > 1)


def test_layers_are_even_with_both_ends() -> None:
    assert _evenly(12, 6) == (0, 2, 4, 7, 9, 11)
    assert _evenly(12, 12) == tuple(range(12))
    assert _evenly(12, 2) == (0, 11)
    assert _evenly(12, 1) == (11,)
    fused = torch.arange(12)[:, None]
    # Queries, keys and values beside each other: of each the same rows.
    assert _cut(fused, (6, 1)).flatten().tolist() == [0, 2, 4, 6, 8, 10]


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    for options, words in (
        ({}, "has this shape already"),
        ({"layers": 4}, "layers 4 is more than the 3"),
        ({"hidden": 64}, "hidden 64 is more than the 32"),
        ({"mlp": 128}, "mlp 128 is more than the 64"),
        ({"hidden": 30}, "cannot have this shape"),
    ):
        with pytest.raises(PlanError, match=words):
            made(source, tmp_path / "out", **options)
    with pytest.raises(PlanError, match="in this shape the model has other weights"):
        made(models_zoo.write("opt", tmp_path), tmp_path / "out", hidden=16)
    for name in ("mixtral", "albert"):
        with pytest.raises(PlanError):
            made(models_zoo.write(name, tmp_path), tmp_path / "out", layers=1)
