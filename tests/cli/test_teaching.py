"""``compress teacher cache``: what it hands to the engine, and what it says of the answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from compress import engine
from compress.cli import app
from compress.core.run import TrainingSource
from compress.training.cache_options import CacheOptions


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def cache_teacher(
        model: str, source: TrainingSource, out: Path, options: CacheOptions, **more: Any
    ) -> engine.CachedTeacher:
        more.pop("reporter")
        found.update(model=model, source=source, out=out, options=options, **more)
        return engine.CachedTeacher(out, 2_048_000, 307.25, did_nothing=False)

    monkeypatch.setattr(engine, "cache_teacher", cache_teacher)
    return found


def test_flags_are_those_of_a_training(asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    words = "teacher cache some/model --text t.txt --validation v.txt --out cache --k 32 --draws 0"
    words += " --tokens 2_000_000 --window 1024 --seed 3 --threads 2 --device cpu --fresh"
    assert app.main(words.split()) == 0, capsys.readouterr().err
    assert asked == {
        "model": "some/model",
        "source": TrainingSource("t.txt", "v.txt"),
        "out": Path("cache"),
        "options": CacheOptions(k=32, draws=0, tokens=2_000_000, window=1024),
        "seed": 3,
        "threads": 2,
        "device": "cpu",
        "fresh": True,
    }
    assert capsys.readouterr().out == "cache: 2,048,000 tokens, 307.2 bytes a token\n"


def test_what_is_not_said_is_left_to_the_engine(
    asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(["teacher", "cache", "m", "--text", "t.txt", "--out", "cache", "--json"]) == 0
    assert set(asked) == {"model", "source", "out", "options", "fresh"}
    assert asked["options"] == CacheOptions()
    assert json.loads(capsys.readouterr().out) == {
        "event": "cached",
        "path": "cache",
        "tokens": 2_048_000,
        "bytes_a_token": 307.25,
        "did_nothing": False,
    }


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("teacher cache m --out cache", "--text"),
        ("teacher cache m --text t --out cache --k 0", "teacher cache: k: Input should be greater"),
        ("teacher cache m --text t --out cache --kk 3", "unknown flag '--kk'"),
        ("teacher keep m", "unknown command 'compress teacher'"),
    ],
)
def test_what_cannot_be_is_one_line(
    words: str, complaint: str, asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(words.split()) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert "Traceback" not in error
    assert not asked
