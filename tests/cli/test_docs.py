"""Generated pages: written, compared, and stale ones found."""

from pathlib import Path

import pytest

from compress.cli.docs import MEASURED, main, pages


def test_the_pages_of_the_repository_are_current(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"], root) == 0, capsys.readouterr().err


def test_pages_are_written_once_and_then_current(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"], tmp_path) == 1
    assert main([], tmp_path) == 0
    assert {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()} == set(pages())
    assert main(["--check"], tmp_path) == 0
    capsys.readouterr()
    assert main([], tmp_path) == 0
    assert capsys.readouterr().out == "", "a current page is not written again"


def test_an_edited_page_and_one_of_a_method_that_is_gone_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([], tmp_path)
    (tmp_path / "docs" / "cli.md").write_text("edited", encoding="utf-8")
    gone = tmp_path / "docs" / "methods" / "quantize.gone.md"
    gone.write_text("gone", encoding="utf-8")
    # Pages that are made by running methods are not made here.
    measured = [tmp_path / "docs" / "methods" / name for name in MEASURED]
    for page in measured:
        page.write_text("measured", encoding="utf-8")
    assert main(["--check"], tmp_path) == 1
    assert capsys.readouterr().err.splitlines() == [
        "docs/cli.md is not current: run `make docs`",
        "docs/methods/quantize.gone.md is not current: run `make docs`",
    ]
    assert main([], tmp_path) == 0
    assert not gone.exists()
    assert all(page.is_file() for page in measured)
    assert main(["--check"], tmp_path) == 0
