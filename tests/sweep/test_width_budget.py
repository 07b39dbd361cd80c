"""Budgets are kept, and the trial that is taken is the best that was measured."""

from functools import partial
from pathlib import Path

import pytest

from compress import engine
from compress.core.artifact import Artifact
from compress.core.errors import PlanError, UsageError
from compress.core.recipe import Recipe
from compress.core.run import CalibrationSource, Run
from compress.prune.width import Width
from compress.sweep import width_trials
from tests import models_zoo
from tests.marks import slow_but
from tests.single_steps import applied, calibration, decisions, killed_and_resumed, loaded, recipe_of

STEP = {"use": "prune.width", "samples": 8, "trials": 3, "measured_samples": 4, "multiple": 8}
prune, planned = partial(applied, **STEP), partial(recipe_of, **STEP)


def body(folder: Path) -> int:
    return sum(p.numel() for name, p in loaded(folder).named_parameters() if ".layers." in name)


def disk(folder: Path) -> int:
    return sum(4 * parameter.numel() for parameter in loaded(folder).parameters())


@pytest.mark.parametrize("budget", slow_but(("60%",), ("60%", "20_000", "90KB", "1.4x")))
def test_a_budget_is_kept_and_the_best_trial_taken(budget: str, tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    out = prune(source=source, out=tmp_path / "out", budget=budget)
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
    assert len(losses) <= 3


def test_blocks_and_channels_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(width_trials, "_FIRST", ())
    monkeypatch.setattr(width_trials, "_WITH_FEWER_BLOCKS", ((1.0, 0.0, 0.0, 0.0),))
    source = models_zoo.write("qwen3", tmp_path)
    out = prune(source=source, out=tmp_path / "out", budget="40%", trials=1)
    said = decisions(out)
    assert said["chosen"]["blocks"] == said["blocks"]["got"] == 2
    assert said["shape"]["mlp"]["got"] < 64
    assert body(out.path) <= 0.4 * body(source)


@pytest.mark.parametrize("budget", ["40%", "60KB"])
def test_blocks_channels_and_components_go_together(
    budget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(width_trials, "_FIRST", ())
    monkeypatch.setattr(width_trials, "_WITH_FEWER_BLOCKS", ((1.0, 0.0, 0.0, 1.0),))
    source = models_zoo.write("llama-tied", tmp_path)
    out = prune(source=source, out=tmp_path / "out", budget=budget, trials=1)
    said, config = decisions(out), loaded(out.path).config
    assert said["chosen"]["components"] < 1
    assert said["chosen"]["hidden"] == 1
    assert config.hidden_size == said["hidden_size"]["got"] < said["hidden_size"]["of"]
    assert config.num_hidden_layers == said["chosen"]["blocks"] == said["blocks"]["got"]
    assert config.intermediate_size == said["shape"]["mlp"]["got"] < said["shape"]["mlp"]["of"]
    # The cost that a trial was planned with is what it came to, the head with a weight of its own included.
    came = body(out.path) if budget == "40%" else disk(out.path)
    assert came <= said["chosen"]["cost"] * (1 + 1e-9)
    assert came <= (0.4 * body(source) if budget == "40%" else 60_000)


def test_components_go_where_they_cost_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.sweep import width_budget

    losses = {True: 1.0, False: 2.0}
    monkeypatch.setattr(
        width_budget._Search, "_loss", lambda self, trial: losses[trial.slices and not trial.narrows]
    )
    source = models_zoo.write("llama", tmp_path)
    out = prune(source=source, out=tmp_path / "out", budget="60%", trials=8)
    said = decisions(out)
    assert said["chosen"]["components"] < 1
    assert (said["chosen"]["mlp"], said["chosen"]["heads"], said["chosen"]["hidden"]) == (1, 1, 1)
    assert body(out.path) <= 0.6 * body(source)


def test_a_search_that_is_killed_does_not_measure_again(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    recipe = planned(source=source, folder=tmp_path, budget="60%", trials=3)
    again = killed_and_resumed(recipe, tmp_path, "budget.trial", 3)
    assert again.count("budget.trial") == 1


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    run = Run(calibration=CalibrationSource(calibration(tmp_path, 8)["calibration"]))
    with pytest.raises(PlanError, match="keeps to 10 parameters in the body"):
        Width(budget="10").check(source, run)
    for budget, words in (("0.5x", "above 1x"), ("120%", "between 0% and 100%"), ("half", "a size is")):
        recipe = planned(source=source.path, folder=tmp_path, budget=budget)
        with pytest.raises(UsageError, match=words):
            engine.run(recipe, tmp_path / "out", single=True)
    with pytest.raises(UsageError, match="leave hidden out"):
        engine.run(
            planned(source=source.path, folder=tmp_path, budget="50%", hidden=0.5),
            tmp_path / "out",
            single=True,
        )


def test_a_recipe_with_a_budget_can_be_spelled_out_and_read_again(tmp_path: Path) -> None:
    document = planned(source=tmp_path / "model", folder=tmp_path, budget="60%")
    recipe = Recipe.of(document)
    assert Recipe.from_yaml(recipe.dump()).dump() == recipe.dump()
    # Also the shares that would be taken if nobody said any: with a budget they would mean nothing.
    for shares in ({"keep": 0.5, "hidden": 0.9}, {"keep": 0.75, "hidden": 1.0}):
        with pytest.raises(UsageError, match="leave keep and hidden out"):
            Recipe.of({**document, "steps": [{**document["steps"][0], **shares}]})
