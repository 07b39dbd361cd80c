"""Whatever happens to a measured process becomes a row that says so."""

import os
import sys
import time
from pathlib import Path

import pytest

from compress.bench.isolate import Reply, run

PREFIX = "import json, os, sys, time; request = json.load(sys.stdin); path = sys.argv[1]\n"


def ran(program: str, *, time_limit: float = 60.0, **request: object) -> Reply:
    command = (sys.executable, "-c", PREFIX + program)
    return run(request, stage="timing", time_limit=time_limit, threads=1, command=command)


def test_json_in_json_out() -> None:
    reply = ran("open(path, 'w').write(json.dumps({'twice': 2 * request['number']}))", number=21)
    assert reply.fault is None
    assert reply.document == {"twice": 42}


def test_threads_are_set_before_anything_is_imported() -> None:
    reply = ran("open(path, 'w').write(json.dumps({'threads': os.environ['OMP_NUM_THREADS']}))")
    assert reply.document == {"threads": "1"}


@pytest.mark.parametrize(
    ("program", "kind", "words"),
    [
        ("os.kill(os.getpid(), 11)", "crashed", "SIGSEGV"),
        ("os.kill(os.getpid(), 9)", "killed", "SIGKILL"),
        ("raise SystemExit(3)", "crashed", "code 3"),
        ("print('the last words'); raise SystemExit(3)", "crashed", "the last words"),
        ("open(path, 'w').write('{half')", "crashed", "code 0"),
        ("pass", "crashed", "code 0"),
        (
            "open(path, 'w').write(json.dumps({'error': {'kind': 'out-of-memory', 'message': 'no more'}}))",
            "out-of-memory",
            "no more",
        ),
        (
            "open(path, 'w').write(json.dumps({'error': {'kind': 'ModelError', 'message': 'damaged'}}))",
            "failed",
            "damaged",
        ),
    ],
)
def test_ends_that_are_not_well(program: str, kind: str, words: str) -> None:
    fault = ran(program).fault
    assert fault is not None
    assert (fault.stage, fault.kind) == ("timing", kind)
    assert words in fault.message


def test_a_hang_ends_with_all_that_it_started(tmp_path: Path) -> None:
    note = tmp_path / "child"
    program = (
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(note)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)"
    )
    fault = ran(program, time_limit=10.0).fault
    assert fault is not None
    assert fault.kind == "timed-out"
    pid = int(note.read_text())
    for _ in range(200):
        if not _lives(pid):
            return
        time.sleep(0.05)
    pytest.fail("the hanging process left a child behind")


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    # An ended process that nobody has waited for yet still has a number.
    return not state.is_file() or ") Z" not in state.read_text()
