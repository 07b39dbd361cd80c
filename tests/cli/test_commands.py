"""What the commands hand to the engine, and what they say of its answer; the engine is a stand-in."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compress import engine
from compress.cli import app
from compress.core.recipe import Recipe

RECIPE = "steps:\n  - use: quantize.rtn\n    bits: 4\n"


@dataclass(frozen=True)
class Weights:
    compared: int


class Engine:
    """Remembers what it was asked; answers like the engine."""

    def __init__(self) -> None:
        self.recipe: Recipe | None = None
        self.asked: dict[str, Any] = {}
        self.executed = False

    def plan(self, recipe: Recipe, out: Path | None, **asked: Any) -> Any:
        self.recipe = recipe
        self.asked = {"out": out, **asked}
        row = {"step": recipe.steps[0].use, "target": str(out), "key": "k", "done": False, "disk_bytes": 5}
        return SimpleNamespace(describe=lambda: [row])

    def execute(self, planned: Any) -> engine.RunResult:
        self.executed = True
        return engine.RunResult([Path("out")], Path("out"), exit_code=11)

    def run(self, recipe: Recipe, out: Path | None, **asked: Any) -> engine.RunResult:
        return self.execute(self.plan(recipe, out, **asked))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Engine:
    found = Engine()
    monkeypatch.setattr(engine, "plan", found.plan)
    monkeypatch.setattr(engine, "run", found.run)
    return found


def test_a_method_command_runs_a_recipe_of_one_step(
    stand_in: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "quantize rtn some/model --out out --bits 8 --group-size channel --seed 3 --threads 2 --fresh"
    words += " --calibration t.txt --samples 16 --device cpu --task text-generation --trust-remote-code"
    code = app.main(words.split())
    assert code == 11, "the exit code of the run is that of the command"
    assert stand_in.recipe == Recipe.of(
        {
            "model": "some/model",
            "task": "text-generation",
            "seed": 3,
            "threads": 2,
            "device": "cpu",
            "trust_remote_code": True,
            "data": {"calibration": "t.txt", "samples": 16},
            "steps": [{"use": "quantize.rtn", "bits": 8, "group_size": "channel"}],
        }
    )
    assert stand_in.asked["out"] == Path("out")
    assert stand_in.asked["single"] is True
    assert stand_in.asked["fresh"] is True
    assert capsys.readouterr().out == "out\n"


def test_a_printed_recipe_runs_the_same_step(
    stand_in: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quantize", "rtn", "some/model", "--bits", "3", "--override", "*.down_proj:bits=8"]
    assert app.main([*words, "--print-recipe"]) == 0
    file = tmp_path / "recipe.yaml"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    assert not stand_in.executed
    app.main([*words, "--out", "out"])
    by_command = stand_in.recipe
    app.main(["run", str(file)])
    assert by_command is not None
    assert stand_in.recipe is not None
    assert stand_in.recipe.dump() == by_command.dump()


def test_run_takes_flags_and_settings_over_the_file(stand_in: Engine, tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text(RECIPE, encoding="utf-8")
    words = [
        "run",
        str(file),
        "--model",
        "m: odd name",
        "--set",
        "steps.0.bits=3",
        "--set",
        "data.eval=e.txt",
    ]
    app.main([*words, "--calibration", "c.txt", "--seed", "5"])
    recipe = stand_in.recipe
    assert recipe is not None
    assert recipe.model == "m: odd name"
    assert recipe.seed == 5
    assert (recipe.data.calibration, recipe.data.eval) == ("c.txt", "e.txt")
    assert recipe.steps[0].options == {"bits": 3}
    assert stand_in.asked["out"] == Path("runs/some")
    assert stand_in.asked["single"] is False


def test_a_plan_is_shown_and_nothing_is_executed(
    stand_in: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(["quantize", "rtn", "m", "--plan"]) == 0
    assert not stand_in.executed
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["quantize.rtn", "to", "do", "5"]
    assert app.main(["quantize", "rtn", "m", "--plan", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["event"] == "plan"
    assert document["steps"][0]["disk_bytes"] == 5


def test_results_are_json_or_silence_when_asked(stand_in: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    app.main(["quantize", "rtn", "m", "--out", "out", "--json"])
    assert json.loads(capsys.readouterr().out) == {
        "event": "result",
        "final": "out",
        "artifacts": ["out"],
        "did_nothing": False,
        "exit_code": 11,
    }
    app.main(["quantize", "rtn", "m", "--out", "out", "--quiet"])
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_inspect_and_verify_show_what_the_engine_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "inspect", lambda path: {"path": str(path), "size": {"bytes": 3}})
    assert app.main(["inspect", "x"]) == 0
    assert capsys.readouterr().out == "path: x\nsize:\n  bytes: 3\n"
    assert app.main(["inspect", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": "x", "size": {"bytes": 3}}

    asked: dict[str, Any] = {}

    def verify(path: Path, **rest: Any) -> Any:
        asked.update(rest)
        return engine.VerificationReport(path, "d", Weights(35))  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "verify", verify)
    assert app.main(["verify", "x", "--trust-remote-code"]) == 0
    assert asked["trust_remote_code"] is True
    assert "compared: 35" in capsys.readouterr().out
    assert app.main(["verify", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == {"compared": 35}


def test_methods_and_schema_are_for_machines_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["methods"]
    assert app.main(["schema"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {method["name"] for method in listed} <= set(document["$defs"])
