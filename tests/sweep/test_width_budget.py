"""Budgets are kept, and the trial that is taken is the best that was measured."""

from pathlib import Path
from typing import Any

import pytest

from compress import engine
from compress.core.artifact import Artifact
from compress.core.errors import PlanError, UsageError
from compress.core.recipe import Recipe
from compress.core.run import CalibrationSource, Run
from compress.prune.width import Width
from tests import models_zoo
from tests.depth_models import calibration, decisions, loaded
from tests.dummies import Killed, KillingRecorder, Recorder
from tests.marks import slow_but


def recipe_of(source: Path, folder: Path, budget: str, **options: Any) -> dict[str, Any]:
    step = {"use": "prune.width", "budget": budget, "trials": 5, "measured_samples": 4, "multiple": 8}
    return {
        "model": str(source),
        "steps": [{**step, **options}],
        "data": calibration(folder, 8),
        "threads": 1,
        "device": "cpu",
    }


def prune(source: Path, out: Path, budget: str, **options: Any) -> Artifact:
    return Artifact.open(engine.run(recipe_of(source, out.parent, budget, **options), out, single=True).final)


def body(folder: Path) -> int:
    return sum(p.numel() for name, p in loaded(folder).named_parameters() if ".layers." in name)


def disk(folder: Path) -> int:
    return sum(4 * parameter.numel() for parameter in loaded(folder).parameters())


@pytest.mark.parametrize("budget", slow_but(("60%",), ("60%", "20_000", "90KB", "1.4x")))
def test_a_budget_is_kept_and_the_best_trial_taken(budget: str, tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    out = prune(source, tmp_path / "out", budget)
    said = decisions(out)
    kept = {
        "60%": lambda: body(out.path) <= 0.6 * body(source),
        "20_000": lambda: body(out.path) <= 20_000,
        "90KB": lambda: disk(out.path) <= 90_000,
        "1.4x": lambda: said["decode"]["predicted_speed"] >= 1.4,
    }
    assert kept[budget]()
    losses = [trial["loss"] for trial in said["trials"]]
    assert losses == sorted(losses)
    assert said["chosen"] == said["trials"][0]
    assert len(losses) <= 5


def test_blocks_and_channels_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.sweep import width_budget

    monkeypatch.setattr(width_budget, "_FIRST", ())
    monkeypatch.setattr(width_budget, "_WITH_FEWER_BLOCKS", ((1.0, 0.0, 0.0),))
    source = models_zoo.write("qwen3", tmp_path)
    out = prune(source, tmp_path / "out", "40%", trials=1)
    said = decisions(out)
    assert said["chosen"]["blocks"] == said["blocks"]["got"] == 2
    assert said["shape"]["mlp"]["got"] < 64
    assert body(out.path) <= 0.4 * body(source)


def test_a_search_that_is_killed_does_not_measure_again(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    recipe = recipe_of(source, tmp_path, "60%", trials=3)
    whole = engine.run(recipe, tmp_path / "whole", single=True).final
    with pytest.raises(Killed):
        engine.run(recipe, tmp_path / "out", single=True, reporter=KillingRecorder("budget.trial", 3))
    again = Recorder()
    resumed = engine.run(recipe, tmp_path / "out", single=True, reporter=again).final
    assert again.count("budget.trial") == 1
    for file in sorted(whole.iterdir()):
        if file.name not in ("compress.run.json",):
            assert (resumed / file.name).read_bytes() == file.read_bytes(), file.name


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    run = Run(calibration=CalibrationSource(calibration(tmp_path, 8)["calibration"]))
    with pytest.raises(PlanError, match="keeps to 10 parameters in the body"):
        Width(budget="10").check(source, run)
    for budget, words in (("0.5x", "above 1x"), ("120%", "between 0% and 100%"), ("half", "a size is")):
        recipe = recipe_of(source.path, tmp_path, budget)
        with pytest.raises(UsageError, match=words):
            engine.run(recipe, tmp_path / "out", single=True)
    with pytest.raises(UsageError, match="leave hidden out"):
        engine.run(recipe_of(source.path, tmp_path, "50%", hidden=0.5), tmp_path / "out", single=True)


def test_a_recipe_with_a_budget_can_be_spelled_out_and_read_again(tmp_path: Path) -> None:
    document = recipe_of(tmp_path / "model", tmp_path, "60%")
    recipe = Recipe.of(document)
    assert Recipe.from_yaml(recipe.dump()).dump() == recipe.dump()
    with pytest.raises(UsageError, match="leave keep and hidden out"):
        Recipe.of({**document, "steps": [{**document["steps"][0], "keep": 0.5, "hidden": 0.9}]})
