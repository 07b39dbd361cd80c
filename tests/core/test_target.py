"""The output folder: claimed, locked, replaced only by what is complete."""

import fcntl
from pathlib import Path

import pytest

from compress.core.errors import TargetError
from compress.core.target import Target


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_new_folder_is_published_and_nothing_else_is_left(tmp_path: Path) -> None:
    target = Target(tmp_path / "deep" / "out", "marker")
    target.claim()
    with target.lock():
        assert target.begin("key") is False
        (target.partial / "marker").write_text("done")
        target.publish()
    assert listing(tmp_path) == ["deep", "deep/out", "deep/out/marker"]


def test_progress_is_taken_up_by_the_same_key_only(tmp_path: Path) -> None:
    target = Target(tmp_path / "out", "marker")
    target.begin("one")
    (target.partial / "block").write_text("finished")
    assert target.begin("one") is True
    assert (target.partial / "block").is_file()
    assert target.begin("one", fresh=True) is False
    assert not (target.partial / "block").exists()
    (target.partial / "block").write_text("finished")
    assert target.begin("two") is False
    assert not (target.partial / "block").exists()


def test_the_old_result_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    target = Target(tmp_path / "out", "marker")
    for content in ("old", "new"):
        target.claim()
        target.begin(content)
        (target.partial / "marker").write_text(content)
        if content == "new":
            assert (target.path / "marker").read_text() == "old"
        target.publish()
    assert (target.path / "marker").read_text() == "new"
    assert listing(tmp_path) == ["out", "out/marker"]


@pytest.mark.parametrize("kind", ["file", "folder", "partial"])
def test_what_is_not_ours_is_refused_and_untouched(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    if kind == "file":
        path.write_text("precious")
    else:
        folder = path if kind == "folder" else tmp_path / ".out.partial"
        folder.mkdir()
        (folder / "precious").write_text("precious")
    before = listing(tmp_path)
    with pytest.raises(TargetError):
        Target(path, "marker").claim()
    assert listing(tmp_path) == before


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    Target(tmp_path / "out", "marker").claim()
    assert listing(tmp_path) == ["out"]


def test_a_second_run_is_refused_while_the_first_holds_the_lock(tmp_path: Path) -> None:
    first, second = Target(tmp_path / "out", "marker"), Target(tmp_path / "out", "marker")
    with first.lock():
        with pytest.raises(TargetError, match="in use by another run"), second.lock():
            pytest.fail("two runs hold one target")
        assert listing(tmp_path) == [".out.lock"]
    with second.lock():
        assert listing(tmp_path) == [".out.lock"]
    assert listing(tmp_path) == []


def test_the_lock_of_a_dead_process_does_not_count(tmp_path: Path) -> None:
    stale = tmp_path / ".out.lock"
    stale.write_text("999999")
    with Target(tmp_path / "out", "marker").lock():
        held = stale.open()
        with pytest.raises(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.close()


def test_what_a_run_killed_at_the_very_end_leaves_is_tidied(tmp_path: Path) -> None:
    target = Target(tmp_path / "out", "marker")
    (target.path / ".progress").mkdir(parents=True)
    (tmp_path / ".out.replaced").mkdir()
    target.tidy()
    assert listing(tmp_path) == ["out"]
