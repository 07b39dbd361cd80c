"""A cached teacher: learned from, taken up after a crash, refused when it is stale."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress import engine
from compress.cli import app
from compress.core.artifact import Artifact, Lineage
from compress.core.errors import CompressError, DataError, EnvironmentFault, PlanError, TargetError
from compress.core.recipe import Recipe
from compress.core.run import TrainingSource
from compress.training import teacher_writing
from compress.training.cache_options import CacheOptions
from tests import models_zoo, teacher_and_student
from tests.dummies import Killed, KillingRecorder, Recorder
from tests.single_steps import bytes_of
from tests.teacher_and_student import recipe

OPTIONS = CacheOptions(tokens=1_280, window=16, evaluation_tokens=128, batch=4, precision="float32")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student of another size, their text, and the cache of the teacher."""
    folder = teacher_and_student.write(tmp_path_factory.mktemp("place"))
    cache(folder, folder / "cache")
    return folder


def cache(place: Path, out: Path, **changes: Any) -> engine.CachedTeacher:
    given: dict[str, Any] = {"options": OPTIONS, "threads": 1, "device": "cpu", **changes}
    teacher = given.pop("teacher", place / "teacher")
    text = given.pop("text", place / "text.txt")
    return engine.cache_teacher(str(teacher), TrainingSource(str(text)), out, **given)


def decisions(folder: Path) -> dict[str, Any]:
    lineage = Lineage.read(folder)
    assert lineage is not None
    return dict(lineage.steps[-1].decisions)


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param("forward_kl", marks=pytest.mark.slow),
        "forward_kl=0.7,cross_entropy=0.3",
    ],
)
def test_a_cached_teacher_leads_to_where_the_live_one_leads(loss: str, place: Path, tmp_path: Path) -> None:
    """Of 96 tokens 64 are kept; both students are judged by the live teacher over all of them.

    The teacher is random, with much of its probability in the tail, and the runs are short: the hard case, in
    which 2% is not to be had. On a trained model: reports/teacher_cache.
    """
    numbers = {"tokens": 5_120, "loss": loss, "keep": "last"}
    # As many tokens as the runs read, so that both learn from the same windows.
    cache(place, tmp_path / "cache", options=OPTIONS.model_copy(update={"tokens": 5_120}))
    engine.run(recipe(place, **numbers), tmp_path / "live", single=True)
    engine.run(recipe(place, cache=str(tmp_path / "cache"), **numbers), tmp_path / "cached", single=True)
    models = [
        AutoModelForCausalLM.from_pretrained(path)
        for path in (place / "teacher", place / "student", tmp_path / "live", tmp_path / "cached")
    ]
    tokens = models_zoo.tokens(16, 16, seed=9)
    with torch.no_grad():
        wanted, *said = (model(tokens).logits[:, :-1].flatten(0, 1).log_softmax(-1) for model in models)
    before, live, cached = (
        float(torch.nn.functional.kl_div(each, wanted, log_target=True, reduction="batchmean"))
        for each in said
    )
    assert live < 0.8 * before
    assert cached == pytest.approx(live, rel=0.05)
    found = decisions(tmp_path / "cached")
    assert found["teacher"] == Artifact.open(place / "teacher").digest
    live_windows = decisions(tmp_path / "live")["windows"]
    assert found["teacher_cache"] == {
        "k": 64,
        "draws": 12,
        "precision": "float32",
        "windows": live_windows,
    }
    measured = [decisions(tmp_path / name)["validation"]["last"]["loss"] for name in ("live", "cached")]
    assert measured[1] == pytest.approx(measured[0], rel=0.05)


def test_any_later_run_may_use_it(place: Path, tmp_path: Path) -> None:
    """Fewer or more tokens, other batches, another seed, another student."""
    cached = str(place / "cache")
    engine.run(recipe(place, cache=cached, tokens=640, batch=8), tmp_path / "fewer", single=True)
    assert decisions(tmp_path / "fewer")["windows"] == 40
    made = recipe(place, cache=cached, tokens=2_560, model=str(tmp_path / "fewer"))
    engine.run(made.with_settings(["seed=7"]), tmp_path / "more", single=True)
    found = decisions(tmp_path / "more")
    assert (found["windows"], found["tokens"]) == (80, 2_560)
    assert found["validation"]["best"]["loss"] < found["validation"]["before"]["loss"]


def test_the_key_of_a_step_knows_what_the_cache_holds_and_not_where_it_lies(
    place: Path, tmp_path: Path
) -> None:
    def key(made: Recipe) -> str | None:
        return engine.plan(made, tmp_path / "out", single=True).steps[0].key

    shutil.copytree(place / "cache", tmp_path / "elsewhere")
    cache(place, tmp_path / "other", options=OPTIONS.model_copy(update={"k": 8}))
    first = key(recipe(place, cache=str(place / "cache")))
    assert key(recipe(place, cache=str(tmp_path / "elsewhere"))) == first
    assert key(recipe(place, cache=str(tmp_path / "other"))) != first
    assert key(recipe(place)) != first


def refused(made: Recipe, out: Path) -> CompressError:
    with pytest.raises(CompressError) as caught:
        engine.plan(made, out, single=True)
    assert not out.exists()
    return caught.value


def test_a_stale_cache_is_refused_when_the_run_is_planned(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "teacher", tmp_path / "teacher")
    weights = load_file(tmp_path / "teacher" / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "text.txt").write_text((place / "text.txt").read_text() + "!")
    cached = {"cache": str(place / "cache")}
    for change, differs in (
        ({"teacher": str(tmp_path / "teacher")}, "teacher"),
        ({"data": {"train": str(tmp_path / "text.txt")}}, "text"),
        ({"window": 32}, "window 16 instead of 32"),
    ):
        found = refused(recipe(place, **cached, **change), tmp_path / "out")
        assert isinstance(found, DataError)
        assert f"is of something else: {differs}" in found.message
        assert "compress teacher cache" in found.hint
    # Both know the same words, and one of them writes them in lower case.
    for name in ("teacher", "student"):
        shutil.copytree(place / name, tmp_path / "lower" / name)
        file = tmp_path / "lower" / name / "tokenizer.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "normalizer": {"type": "Lowercase"}}))
    made = recipe(place, **cached, model=str(tmp_path / "lower" / "student"))
    assert "is of something else: tokenizer" in refused(made, tmp_path / "out").message


def test_what_is_no_cache_is_refused(place: Path, tmp_path: Path) -> None:
    found = refused(recipe(place, cache=str(tmp_path / "absent")), tmp_path / "out")
    assert "is no cached teacher" in found.message
    with pytest.raises(CompressError, match="a cached teacher cannot be softened"):
        recipe(place, cache=str(place / "cache"), temperature=2.0)


@pytest.mark.parametrize("moment", [("teacher.write", 1), ("teacher.finish", 2), ("teacher.write", 4)])
def test_a_killed_caching_goes_on_to_the_same_bytes(
    moment: tuple[str, int], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_writing, "_FILE_BYTES", 80_000)
    cache(place, tmp_path / "whole")
    out = tmp_path / "cache"
    with pytest.raises(Killed):
        cache(place, out, reporter=KillingRecorder(*moment))
    assert not out.exists()
    recorder = Recorder()
    cache(place, out, reporter=recorder)
    assert recorder.count("teacher.write") == {1: 6, 2: 4, 4: 3}[moment[1]]
    assert any("interrupted" in text for text in recorder.messages) == (moment[1] > 1)
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "whole"]


def test_what_is_there_is_used_and_what_is_stale_is_made_again(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    shutil.copytree(place / "cache", out)
    recorder = Recorder()
    assert cache(place, out, reporter=recorder).did_nothing
    assert recorder.count("teacher.write") == 0
    assert not cache(place, out, seed=3).did_nothing
    assert not cache(place, out, options=OPTIONS.model_copy(update={"k": 9})).did_nothing
    assert json.loads((out / "teacher.json").read_text())["k"] == 9
    (out / "said-00000.safetensors").unlink()
    assert not cache(place, out, options=OPTIONS.model_copy(update={"k": 9})).did_nothing
    assert not cache(place, out, options=OPTIONS.model_copy(update={"k": 9}), fresh=True).did_nothing


def test_a_full_disk_is_told_and_nothing_is_left(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device", "file")

    with monkeypatch.context() as patched:
        patched.setattr(teacher_writing, "write_shard", full)
        with pytest.raises(EnvironmentFault, match="No space left"):
            cache(place, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("compress.core.target.Target.room", lambda self: 1000)
    with pytest.raises(EnvironmentFault, match="the cache needs about"):
        cache(place, tmp_path / "cache")


def test_what_cannot_be_cached_is_refused(place: Path, tmp_path: Path) -> None:
    encoder = models_zoo.write("bert", tmp_path)
    with pytest.raises(PlanError, match="no causal language model"):
        cache(place, tmp_path / "cache", teacher=encoder)
    with pytest.raises(DataError):
        cache(place, tmp_path / "cache", text=tmp_path / "absent.txt")
    with pytest.raises(PlanError, match="longer than the 64 positions"):
        cache(place, tmp_path / "cache", options=OPTIONS.model_copy(update={"window": 128}))
    with pytest.raises(PlanError, match="less than one window"):
        cache(place, tmp_path / "cache", options=OPTIONS.model_copy(update={"tokens": 5}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(TargetError, match="was not made by compress"):
        cache(place, tmp_path / "mine")


def test_the_command_line_caches(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["teacher", "cache", str(place / "teacher"), "--text", str(place / "text.txt")]
    words += ["--out", str(tmp_path / "cache"), "--tokens", "1_280", "--window", "16", "--k", "16"]
    words += ["--device", "cpu", "--threads", "1"]
    assert app.main(words) == 0, capsys.readouterr().err
    assert "bytes a token" in capsys.readouterr().out
    assert app.main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["event"] == "cached"
    assert said["did_nothing"] is True
    distil = ["distill", "logits", str(place / "student"), "--teacher", str(place / "teacher")]
    distil += ["--train", str(place / "text.txt"), "--cache", str(tmp_path / "cache")]
    distil += ["--tokens", "640", "--window", "16", "--batch", "4", "--device", "cpu", "--threads", "1"]
    assert app.main([*distil, "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert app.main([*words, "--k", "0"]) == 2
    assert "k: Input should be greater than" in capsys.readouterr().err
