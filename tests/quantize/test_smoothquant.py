"""quantize.smoothquant is a transform and a rounding of weights and inputs to 8 bits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from compress import engine
from compress.core.artifact import Artifact
from compress.core.errors import UsageError
from compress.core.passes import name_of
from compress.models.tasks import resolve
from compress.quantize.smoothquant import SmoothQuant
from compress.runtimes import Placement, find
from tests import models_zoo
from tests.single_steps import calibration


def recipe(source: Path, folder: Path, *steps: dict[str, Any]) -> dict[str, Any]:
    data = calibration(folder)
    return {"model": str(source), "steps": list(steps), "data": data, "threads": 1, "device": "cpu"}


def logits(folder: Path) -> torch.Tensor:
    artifact = Artifact.open(folder)
    session = find("torch-eager").load(artifact, resolve("auto", artifact.config), Placement(dtype="float32"))
    return session.outputs(models_zoo.tokens())


def test_it_stands_for_a_transform_and_a_rounding_to_eight_bits() -> None:
    method = SmoothQuant(alpha=0.7, producers="all", activations="static", ignore=("*.x",), include=("y",))
    smoothing, rounding = (dict(part.model_dump()) for part in method.expand())
    assert [name_of(part) for part in method.expand()] == ["transform.smoothquant", "quantize.rtn"]
    assert smoothing == {"ignore": ("*.x",), "alpha": 0.7, "producers": "all"}
    expected = {
        "bits": 8,
        "group_size": "channel",
        "symmetric": True,
        "format": "int",
        "activations": "static",
        "ignore": ("*.x",),
        "include": ("y",),
    }
    assert expected.items() <= rounding.items()
    assert [part.reads_calibration for part in method.expand()] == [True, True]


def test_floats_and_other_rounders() -> None:
    assert SmoothQuant(format="fp8").expand()[1].model_dump()["format"] == "fp8"
    assert name_of(SmoothQuant(rounder="gptq").expand()[1]) == "quantize.gptq"
    with pytest.raises(UsageError, match=r"quantize\.gptq.*rounds to int; quantize\.rtn"):
        SmoothQuant(rounder="gptq", format="fp8").expand()


def test_one_folder_holds_what_the_two_steps_give(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    rounding = {"use": "quantize.rtn", "activations": "dynamic"}
    two = recipe(source, tmp_path, {"use": "transform.smoothquant"}, rounding)
    long = Artifact.open(engine.run(two, tmp_path / "long").final)
    one = recipe(source, tmp_path, {"use": "quantize.smoothquant"})
    short = Artifact.open(engine.run(one, tmp_path / "short", single=True).final)
    assert short.digest == long.digest
    assert short.lineage is not None
    assert [step.use for step in short.lineage.steps] == ["transform.smoothquant", "quantize.rtn"]


def test_outliers_cost_less_than_without_smoothing(tmp_path: Path) -> None:
    """Three channels of every norm are fifty times larger: a token's scale is then theirs alone."""
    model = models_zoo.build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in (
                (
                    layer.input_layernorm,
                    (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                ),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight[:3] *= 50
                for reader in readers:
                    reader.weight[:, :3] /= 50
    source = tmp_path / "model"
    model.save_pretrained(source)
    before = logits(source)
    errors = {}
    for use in ("quantize.rtn", "quantize.smoothquant"):
        step = {"use": use, "activations": "dynamic"}
        folder = engine.run(recipe(source, tmp_path, step), tmp_path / use, single=True).final
        errors[use] = float((logits(folder) - before).norm() / before.norm())
    assert errors["quantize.smoothquant"] < errors["quantize.rtn"] / 2
