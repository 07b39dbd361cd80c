"""``compress analyze sensitivity``: a table, a picture, JSON, and nothing left behind."""

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from compress.cli import app
from compress.cli.analysis import sensitivity_text, short_name
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
