"""`compress convert`: the one-step recipe that each format stands for."""

from pathlib import Path

import pytest
import yaml

from compress import engine
from compress.cli import app
from compress.cli.conversion import DESTINATIONS
from compress.core.passes import find


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert app.main(["convert", "some/model", *words, "--print-recipe"]) == 0, capsys.readouterr().err
    return yaml.safe_load(capsys.readouterr().out)["steps"][0]


def test_every_format_is_an_export(capsys: pytest.CaptureFixture[str]) -> None:
    for to, destination in DESTINATIONS.items():
        assert issubclass(find(destination.use), object)
        step = printed(capsys, "--to", to)
        assert step["use"] == destination.use
        assert step | dict(destination.settled) == step


def test_version_2_is_said_by_the_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--to", "gptq")["version"] == "auto"
    assert printed(capsys, "--to", "gptq_v2", "--inexact", "round") == {
        "use": "export.gptq",
        "version": "v2",
        "inexact": "round",
    }


def test_options_of_a_format(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--to", "gguf", "--type", "q8_0")["type"] == "q8_0"
    assert printed(capsys, "--to", "onnx", "--accuracy-level", "0")["accuracy_level"] == 0


def test_an_option_of_another_format_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["convert", "m", "--to", "awq", "--type", "f16", "--out", "d"]) == 2
    error = capsys.readouterr().err
    assert "--type is no option of --to awq" in error
    assert "it belongs to --to gguf" in error


def test_a_value_that_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["convert", "m", "--to", "gguf", "--type", "q7_k", "--out", "d"]) == 2
    assert "export.gguf: type" in capsys.readouterr().err


def test_an_unknown_format_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["convert", "m", "--to", "gguv", "--out", "d"]) == 2
    error = capsys.readouterr().err
    assert "unknown format 'gguv'" in error
    assert "did you mean 'gguf'?" in error


def test_the_folder_of_the_result_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["convert", "m", "--to", "gguf"]) == 2
    assert "needs --out DIR" in capsys.readouterr().err


def test_the_help_shows_formats_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["convert", "--help"]) == 0
    text = capsys.readouterr().out
    assert "[gptq|gptq_v2|awq|gguf|onnx|compressed-tensors]" in "".join(text.split())
    assert "compress convert MODEL --to gguf --out DIR --type f16" in text


def test_it_is_planned_like_a_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = {}

    def plan(recipe: object, out: Path | None, **options: object) -> object:
        asked.update(recipe=recipe, out=out, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "plan", plan)
    words = [
        "convert",
        "some/model",
        "--to",
        "gptq",
        "--out",
        str(tmp_path / "out"),
        "--plan",
        "--threads",
        "2",
    ]
    assert app.main(words) != 0
    assert asked["single"] is True
    assert asked["recipe"].threads == 2
    assert asked["recipe"].steps[0].use == "export.gptq"
