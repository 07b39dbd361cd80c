"""Execution: run, resume, and never twice what is there."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from compress import engine
from compress.core.artifact import Artifact, digest_of
from compress.core.errors import (
    EnvironmentFault,
)
from tests.dummies import Nudge, Recorder, register
from tests.engine.conftest import RTN, recipe


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_step_into_one_folder_and_a_second_run_does_nothing(model: Path, tmp_path: Path) -> None:
    first = engine.run(recipe(model, RTN), tmp_path / "out", single=True)
    assert first.final == tmp_path / "out"
    assert not first.did_nothing
    assert listing(tmp_path) == ["out"]
    times = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    recorder = Recorder()
    second = engine.run(recipe(model, RTN), tmp_path / "out", single=True, reporter=recorder)
    assert second.did_nothing
    assert any("nothing to do" in message for message in recorder.messages)
    assert recorder.count("block.start") == 0
    assert times == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}


def test_the_same_inputs_give_the_same_bytes(model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        engine.run(recipe(model, RTN), tmp_path / name, single=True)
    one, two = tmp_path / "one", tmp_path / "two"
    assert digest_of(one) == digest_of(two)
    assert (one / "compress.json").read_bytes() == (two / "compress.json").read_bytes()


def test_fresh_starts_over(model: Path, tmp_path: Path) -> None:
    engine.run(recipe(model, RTN), tmp_path / "out", single=True)
    recorder = Recorder()
    engine.run(recipe(model, RTN), tmp_path / "out", single=True, fresh=True, reporter=recorder)
    assert recorder.count("block.start") == 4


def test_a_changed_step_redoes_only_what_follows_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, "transform.nudge", Nudge)
    nudge = {"use": "transform.nudge", "factor": 2.0}
    engine.run(recipe(model, nudge, RTN), tmp_path / "out")
    first = (tmp_path / "out" / "01-transform.nudge" / "compress.json").stat().st_mtime_ns
    result = engine.run(recipe(model, nudge, {**RTN, "bits": 8}), tmp_path / "out")
    assert (tmp_path / "out" / "01-transform.nudge" / "compress.json").stat().st_mtime_ns == first
    assert Artifact.open(result.final).lineage is not None
    assert engine.inspect(result.final)["lineage"][1]["options"]["bits"] == 8
    engine.run(recipe(model, {**nudge, "factor": 3.0}, {**RTN, "bits": 8}), tmp_path / "out")
    assert (tmp_path / "out" / "01-transform.nudge" / "compress.json").stat().st_mtime_ns != first


def test_intermediates_may_be_dropped_and_a_second_run_still_does_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, "transform.nudge", Nudge)
    steps = recipe(model, {"use": "transform.nudge"}, RTN, keep="last")
    result = engine.run(steps, tmp_path / "out")
    assert listing(tmp_path / "out") == ["02-quantize.rtn", "compress.plan.json"]
    lineage = Artifact.open(result.final).lineage
    assert lineage is not None
    assert [step.use for step in lineage.steps] == ["transform.nudge", "quantize.rtn"]
    assert engine.run(steps, tmp_path / "out").did_nothing


def test_a_failing_write_keeps_finished_blocks_and_a_second_run_takes_them_up(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.sweep import sweep

    real = sweep.write_unit
    calls = []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device", str(tmp_path))
        return real(*arguments)

    monkeypatch.setattr(sweep, "write_unit", failing)
    with pytest.raises(EnvironmentFault, match="No space left"):
        engine.run(recipe(model, RTN), tmp_path / "out", single=True)
    assert listing(tmp_path) == [".out.partial"]
    recorder = Recorder()
    engine.run(recipe(model, RTN), tmp_path / "out", single=True, reporter=recorder)
    assert recorder.count("block.resume") == 2
    assert recorder.count("block.start") == 2
    engine.run(recipe(model, RTN), tmp_path / "reference", single=True)
    assert digest_of(tmp_path / "out") == digest_of(tmp_path / "reference")


def test_companions_travel_along_untouched(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model, source)
    (source / "README.md").write_text("card")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    engine.run(recipe(source, RTN), tmp_path / "out", single=True)
    assert (tmp_path / "out" / "README.md").read_text() == "card"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
