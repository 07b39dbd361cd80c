"""``compress analyze``: tables, pictures, JSON, and nothing left behind."""

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from compress.cli import app
from compress.cli.analysis import importance_text, sensitivity_text, short_name
from compress.sweep.importance import BlockImportance, Importance, PartsImportance
from compress.sweep.sensitivity import Sensitivity
from tests import models_zoo


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    save_file({"input_ids": models_zoo.tokens(4, 8)}, tmp_path / "tokens.safetensors")
    model = models_zoo.write("llama", tmp_path)
    text = str(tmp_path / "tokens.safetensors")
    sizes = ["--samples", "4", "--sequence-length", "8", "--group-size", "16"]
    return ["analyze", "sensitivity", str(model), "--calibration", text, *sizes, "--device", "cpu"]


def test_the_worst_part_comes_first(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main([*words, "--candidate", "2", "--candidate", "4", "--quiet", "--json"]) == 0
    parts = json.loads(capsys.readouterr().out.splitlines()[-1])["parts"]
    assert len(parts) == 12
    assert all(part["divergence"]["2"] > part["divergence"]["4"] for part in parts)


def test_it_is_drawn(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "layers.svg"
    assert app.main([*words, "--candidate", "3", "--candidate", "4", "--plot", str(picture)]) == 0
    assert "self_attn.(q_proj|k_proj|v_proj)" in capsys.readouterr().out
    assert b"<svg" in picture.read_bytes()
    assert "model.layers.2.mlp.down_proj" in picture.read_text()


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--plot", "layers.gif"], 2, "is no picture that can be drawn"),
        (["--plot", "absent/layers.svg"], 6, "there is no folder"),
        (["--candidate", "7"], 2, "candidates"),
        (["--group-size", "24"], 5, "which groups of 24 do not divide"),
        (["--calibration", "absent.txt"], 4, "absent.txt"),
    ],
)
def test_what_cannot_be_is_one_line(
    words: list[str], more: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main([*words, *more]) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_names_and_bars() -> None:
    assert short_name(("a.q", "a.k")) == "a.(q|k)"
    assert short_name(("a.q", "b.k", "c")) == "a.q and 2 more"
    assert short_name(("a.q",)) == "a.q"
    found = [
        Sensitivity((name,), name, 10, {2: value, 4: value / 4}) for name, value in (("x", 0.1), ("y", 0.4))
    ]
    lines = sensitivity_text(found).splitlines()
    assert lines[1].startswith("y")
    assert lines[1].count("#") == 4 * lines[2].count("#") == 24


@pytest.fixture
def looking(tmp_path: Path) -> list[str]:
    save_file({"input_ids": models_zoo.tokens(4, 8)}, tmp_path / "tokens.safetensors")
    model = models_zoo.write("llama", tmp_path)
    text = str(tmp_path / "tokens.safetensors")
    sizes = ["--samples", "4", "--sequence-length", "8", "--device", "cpu"]
    return ["analyze", "importance", str(model), "--calibration", text, *sizes]


def test_importance_is_shown_saved_and_drawn(
    looking: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, picture = tmp_path / "importance.json", tmp_path / "importance.svg"
    assert app.main([*looking, "--taylor", "--save", str(saved), "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.2.self_attn.o_proj" in shown
    assert "4 in 2 groups" in shown
    assert "Loss of the whole model" in shown
    document = json.loads(saved.read_text())
    assert [len(part["activation"]) for part in document["parts"]] == [4, 64] * 3
    assert [len(part["taylor"]) for part in document["parts"]] == [4, 64] * 3
    assert "model.layers.2.mlp.down_proj" in picture.read_text()


def test_importance_as_json_is_what_is_saved(
    looking: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "importance.json"
    assert app.main([*looking, "--no-loss", "--quiet", "--json", "--save", str(saved)]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads(saved.read_text())
    assert document["loss"] is None
    assert all(block["influence"] > 0 for block in document["blocks"])


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--plot", "blocks.gif"], 2, "is no picture that can be drawn"),
        (["--save", "absent/blocks.json"], 6, "there is no folder"),
        (["--task", "feature-extraction", "--taylor"], 5, "leave --taylor out"),
        (["--calibration", "absent.txt"], 4, "absent.txt"),
    ],
)
def test_importance_that_cannot_be_measured_is_one_line(
    looking: list[str], more: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main([*looking, *more]) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_tables_of_importance() -> None:
    blocks = (BlockImportance("a", 0.5, 3.0), BlockImportance("b", 0.25, 2.5), BlockImportance("c", 0.1))
    heads = PartsImportance("a.out", "heads", 2, (4.0, 1.0, 2.0, 3.0))
    channels = PartsImportance("a.down", "channels", 10, (*[1.0] * 9, 11.0))
    text = importance_text(Importance(blocks, (heads, channels), 2.0, 8, {"b.down": "experts"}))
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert lines["a"].split() == ["a", "0.5000", "3.0000", "#" * 24]
    assert lines["b"].count("#") == 12
    # Nothing that is finite is left without it.
    assert lines["c"].split() == ["c", "0.1000", "-", "#" * 24]
    assert "1 (10.0%) 2 (20.0%)" in lines["a.out"]
    assert "0 (40.0%) 3 (30.0%)" in lines["a.out"]
    assert lines["a.down"].split()[1:] == [
        "10", "activation", "0.500", "0.500", "0.500", "0.500", "5.500", "80.0%"
    ]  # fmt: skip
    assert "b.down: experts" in text
    plain = importance_text(Importance(blocks, (), None, 8))
    assert "loss" not in plain
    assert plain.splitlines()[1].count("#") == 24
