"""The example of the README runs, and says what it did."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from tests import models_zoo


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return models_zoo.write("llama", tmp_path)


def test_the_example_quantizes_verifies_and_shows_sizes(
    model: Path,
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["quantize.py", str(model), str(out)])
    runpy.run_path(str(root / "examples" / "quantize.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert re.search(rf"{re.escape(str(out))}: verified, digest [0-9a-f]{{12}}", text)
    assert (out / "compress.json").is_file()


def test_the_example_ends_with_the_error_where_there_is_no_model(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["quantize.py", str(tmp_path / "absent"), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="error: no model at"):
        runpy.run_path(str(root / "examples" / "quantize.py"), run_name="__main__")


def test_the_snippet_of_the_readme_runs(
    model: Path,
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to").mkdir(parents=True)
    model.rename(tmp_path / "path" / "to" / "model")
    exec(compile(snippet, "README.md", "exec"), {})
    assert (tmp_path / "path" / "to" / "result" / "compress.json").is_file()
    assert capsys.readouterr().out
