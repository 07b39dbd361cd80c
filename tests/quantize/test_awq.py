"""quantize.awq is a transform and a rounding: the same bytes, two steps in the lineage, one folder."""

from pathlib import Path
from typing import Any

import pytest

from compress import engine
from compress.core.artifact import Artifact
from compress.core.errors import PlanError, UsageError
from compress.core.passes import name_of
from compress.core.recipe import Recipe, Step
from compress.core.run import Run
from compress.engine.planning import expanded
from compress.quantize.awq import Awq
from tests import models_zoo
from tests.dummies import Killed, KillingRecorder, Recorder
from tests.single_steps import calibration

OPTIONS = {"bits": 4, "group_size": 16}


def recipe(source: Path, folder: Path, *steps: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": str(source),
        "steps": list(steps),
        "data": calibration(folder),
        "threads": 1,
        "device": "cpu",
    }


def test_it_stands_for_a_transform_and_a_rounding_of_one_scheme() -> None:
    scale, rounding = Awq(bits=3, rounder="gptq", ignore=("*.x",), include=("lm_head",), grid=7).expand()
    assert (name_of(scale), name_of(rounding)) == ("transform.awq", "quantize.gptq")
    for option in ("bits", "group_size", "symmetric", "integer_range", "fallback", "ignore"):
        assert getattr(scale, option) == getattr(rounding, option)
    assert (scale.model_dump()["grid"], rounding.model_dump()["include"]) == (7, ("lm_head",))
    assert Awq().expand()[0].model_dump()["integer_range"] == Awq().expand()[1].model_dump()["integer_range"]


def test_a_recipe_expands_where_the_step_stands() -> None:
    steps = (Step(use="prune.wanda"), Step(use="quantize.awq", bits=3), Step(use="export.onnx"))
    after = expanded(Recipe(model="m", steps=steps))
    assert [step.use for step in after.steps] == [
        "prune.wanda",
        "transform.awq",
        "quantize.rtn",
        "export.onnx",
    ]
    assert after.steps[2].built().model_dump()["bits"] == 3


def test_one_folder_holds_what_the_two_steps_give(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    two = recipe(
        source,
        tmp_path,
        {"use": "transform.awq", **OPTIONS},
        {"use": "quantize.rtn", "clip": "mse", **OPTIONS},
    )
    long = Artifact.open(engine.run(two, tmp_path / "long").final)
    one = recipe(source, tmp_path, {"use": "quantize.awq", **OPTIONS})
    short = Artifact.open(engine.run(one, tmp_path / "short", single=True).final)
    assert short.digest == long.digest
    assert short.lineage is not None
    assert [step.use for step in short.lineage.steps] == ["transform.awq", "quantize.rtn"]
    assert short.path == tmp_path / "short"
    # Nothing of the step between is left, and running again does nothing.
    assert not list(tmp_path.glob(".short*"))
    assert engine.run(one, tmp_path / "short", single=True).did_nothing


def test_a_run_killed_in_the_second_step_keeps_the_first(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    one = recipe(source, tmp_path, {"use": "quantize.awq", **OPTIONS})
    with pytest.raises(Killed):
        engine.run(one, tmp_path / "out", single=True, reporter=KillingRecorder("artifact.rename", 2))
    assert not (tmp_path / "out").exists()
    again = Recorder()
    engine.run(one, tmp_path / "out", single=True, reporter=again)
    # The transform is there, and so are the rounded blocks.
    assert again.count("block.calibrate") == 0
    assert again.count("artifact.done") == 1
    assert not list(tmp_path.glob(".out*"))


def test_it_is_refused_as_its_parts_are(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    with pytest.raises(PlanError, match="needs calibration text"):
        Awq().check(source, Run())
    with pytest.raises(UsageError, match=r"stands for transform\.awq and quantize\.rtn"):
        Awq().apply(source, tmp_path / "out", Run())
