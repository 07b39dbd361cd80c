"""Looking into a model: what is measured comes back, nothing stays behind, and other steps are refused."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from compress import engine
from compress.core.errors import ModelError, PlanError, UsageError
from compress.core.recipe import Recipe
from tests import models_zoo
from tests.dummies import Recorder
from tests.engine.conftest import recipe

AUTO = {"use": "quantize.auto", "candidates": [2, 4], "group_size": 16, "measured_samples": 4}


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    save_file({"input_ids": models_zoo.tokens(4, 8)}, tmp_path / "tokens.safetensors")
    return {"calibration": str(tmp_path / "tokens.safetensors"), "samples": 4, "sequence_length": 8}


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def asked(model: Path, data: dict[str, Any], *steps: dict[str, Any]) -> Recipe:
    return recipe(model, *steps, data=data, device="cpu")


def test_sensitivity_measures_every_part_and_leaves_nothing(
    model: Path, data: dict[str, Any], scratch: Path
) -> None:
    files, reporter = sorted(model.iterdir()), Recorder()
    found = engine.sensitivity(asked(model, data, AUTO), reporter=reporter)
    assert len(found) == 12
    assert all(part.divergence[2] > part.divergence[4] > 0 for part in found)
    assert sorted(model.iterdir()) == files
    assert not any(scratch.iterdir())
    assert reporter.count("begin") == reporter.count("end") > 0


@pytest.mark.parametrize("by", ["influence", "loss"])
def test_importance_measures_blocks_and_parts_and_leaves_nothing(
    by: str, model: Path, data: dict[str, Any], scratch: Path
) -> None:
    files, reporter = sorted(model.iterdir()), Recorder()
    found = engine.importance(asked(model, data, {"use": "prune.depth", "by": by}), reporter=reporter)
    assert [block.block for block in found.blocks] == [f"model.layers.{number}" for number in range(3)]
    assert (found.loss is not None) == (by == "loss")
    assert all((block.loss is not None) == (by == "loss") for block in found.blocks)
    assert len(found.parts) == 6
    assert sorted(model.iterdir()) == files
    assert not any(scratch.iterdir())
    assert reporter.count("begin") == reporter.count("end") > 0


def test_a_recipe_of_something_else_is_refused(model: Path, data: dict[str, Any]) -> None:
    depth = {"use": "prune.depth"}
    with pytest.raises(
        UsageError, match=r"sensitivity is measured by quantize\.auto alone, got prune\.depth"
    ):
        engine.sensitivity(asked(model, data, depth))
    with pytest.raises(UsageError, match=r"as prune\.depth alone does, got prune\.depth, quantize\.rtn"):
        engine.importance(asked(model, data, depth, {"use": "quantize.rtn"}))


def test_what_a_plan_refuses_is_refused(model: Path, data: dict[str, Any], tmp_path: Path) -> None:
    depth = {"use": "prune.depth"}
    with pytest.raises(PlanError, match="measured on calibration text"):
        engine.importance(asked(model, {}, depth))
    with pytest.raises(ModelError, match="no model at"):
        engine.importance(asked(tmp_path / "absent", data, depth))
    with pytest.raises(PlanError, match="longer than the model's 64 positions"):
        engine.importance(asked(model, {**data, "sequence_length": 65}, depth))
