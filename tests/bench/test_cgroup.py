"""A measured process in a memory cgroup of its own."""

import subprocess
import sys

import pytest

from compress.bench import cgroup

SCRIPT = """
import sys
from pathlib import Path
from compress.bench import cgroup

folder = cgroup.enter(sys.argv[1])
if not isinstance(folder, Path):
    print(folder)
    raise SystemExit(3)
held = bytearray(int(sys.argv[2]) * 2**20)
print(cgroup.peak_bytes(folder))
"""


def peak(name: str, mebibytes: int) -> int:
    """What a process that holds so much is charged for, in bytes; the test is skipped where none may know."""
    command = [sys.executable, "-c", SCRIPT, name, str(mebibytes)]
    done = subprocess.run(command, capture_output=True, text=True)
    cgroup.remove(name)
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_the_peak_is_what_the_process_held() -> None:
    small, large = peak("compress-bench-test", 8), peak("compress-bench-test", 72)
    assert large - small == pytest.approx(64 * 2**20, rel=0.1)


def test_nothing_stays_behind() -> None:
    peak("compress-bench-test-2", 1)
    here = cgroup._here()
    assert here is not None
    assert not (here / "compress-bench-test-2").exists()


def test_a_name_that_is_taken_is_told_and_not_joined() -> None:
    here = cgroup._here()
    if here is None or not here.is_dir():
        pytest.skip("this system has no memory cgroups")
    try:
        (here / "compress-bench-test-3").mkdir()
    except OSError:
        pytest.skip("no cgroup may be made")
    try:
        said = cgroup.enter("compress-bench-test-3")
        assert isinstance(said, str)
        assert "no memory cgroup" in said
        assert (here / "compress-bench-test-3").exists()
    finally:
        cgroup.remove("compress-bench-test-3")
