"""The engine: plan, run, resume, verify, and never twice what is there."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from compress import engine
from compress.core.artifact import Artifact, digest_of
from compress.core.errors import (
    EnvironmentFault,
    ModelError,
    PlanError,
    TargetError,
    UsageError,
    VerificationError,
)
from compress.core.recipe import Recipe
from compress.core.target import Target
from tests import models_zoo
from tests.dummies import Nudge, Recorder, register

RTN: dict[str, Any] = {"use": "quantize.rtn", "group_size": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models_zoo.write("llama", tmp_path_factory.mktemp("model"))


def recipe(model: Path, *steps: dict[str, Any], **others: Any) -> Recipe:
    return Recipe.of({"model": str(model), "steps": list(steps), "threads": 1, **others})


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


def test_a_chain_that_cannot_work_is_refused_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"step 1 \(quantize.rtn\) needs float weights, which quantize.rtn"):
        engine.run(recipe(model, RTN, RTN), tmp_path / "out")
    assert listing(tmp_path) == []


def test_an_artifact_of_ours_cannot_be_quantized_again(model: Path, tmp_path: Path) -> None:
    engine.run(recipe(model, RTN), tmp_path / "out", single=True)
    with pytest.raises(PlanError, match="needs float weights"):
        engine.plan(recipe(tmp_path / "out", RTN), tmp_path / "again")


def test_a_plan_predicts_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    plan = engine.plan(recipe(model, RTN), tmp_path / "out", single=True)
    (row,) = plan.describe()
    assert row["done"] is False
    assert listing(tmp_path) == []
    engine.execute(plan)
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    # Headers come on top of the tensors that the prediction counts.
    assert row["disk_bytes"] <= written <= row["disk_bytes"] * 1.5
    assert engine.plan(recipe(model, RTN), tmp_path / "out", single=True).already_done


def test_a_disk_that_is_too_small_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Target, "room", lambda _: 1000)
    with pytest.raises(EnvironmentFault, match="of disk"):
        engine.run(recipe(model, RTN), tmp_path / "out")
    assert listing(tmp_path) == []


def test_a_folder_that_is_not_ours_is_refused_and_untouched(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    for single in (True, False):
        with pytest.raises(TargetError, match="not made by compress"):
            engine.run(recipe(model, RTN), tmp_path / "out", single=single)
    assert listing(tmp_path) == ["out"]
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


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


def test_verify_holds_an_artifact_against_its_lineage(model: Path, tmp_path: Path) -> None:
    engine.run(recipe(model, RTN), tmp_path / "out", single=True)
    report = engine.verify(tmp_path / "out")
    assert report.weights is not None
    assert (report.weights.changed, report.weights.unchanged) == (21, 9)
    (tmp_path / "out" / "README.md").write_text("a card may be edited")
    engine.verify(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises((VerificationError, ModelError)):
        engine.verify(tmp_path / "out")


def test_verify_needs_a_lineage(model: Path) -> None:
    with pytest.raises(ModelError, match="no lineage"):
        engine.verify(model)


def test_companions_travel_along_untouched(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model, source)
    (source / "README.md").write_text("card")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    engine.run(recipe(source, RTN), tmp_path / "out", single=True)
    assert (tmp_path / "out" / "README.md").read_text() == "card"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_the_key_changes_with_everything_that_can_change_a_byte(model: Path, tmp_path: Path) -> None:
    def key(**changes: Any) -> str | None:
        step = {**RTN, **changes.pop("step", {})}
        return engine.plan(recipe(model, step, **changes), tmp_path / "out", single=True).steps[0].key

    base = key()
    assert base == key()
    assert base == key(seed=1), "rounding to nearest draws nothing, so the seed is not part of it"
    different = [key(step={"bits": 8}), key(**{"threads": 2}), key(task="text-generation")]
    assert len({base, *different}) == 4


def test_an_unknown_model_names_what_is_near(model: Path, tmp_path: Path) -> None:
    with pytest.raises((ModelError, UsageError)):
        engine.plan(recipe(model.parent / "lama", RTN), tmp_path / "out")
