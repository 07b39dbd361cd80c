"""Whatever happens to a measured process becomes a row that says so."""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.bench.isolate import Reply, run

PREFIX = "import json, os, sys, time; request = json.loads(sys.stdin.readline()); path = sys.argv[1]\n"
TURN = "os.write(request['turns'], b'.'); sys.stdin.readline()\n"


Ran = Callable[..., Reply]
Together = Callable[..., dict[str, Reply]]


@pytest.fixture(params=["started by itself", "a copy"])
def imported(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """What the processes are copies of, if they are."""
    return ("json", "subprocess") if request.param == "a copy" else ()


@pytest.fixture
def ran(imported: tuple[str, ...], tmp_path: Path) -> Ran:
    """Runs one program."""

    def run_one(program: str, *, time_limit: float = 60.0, **request: object) -> Reply:
        file = tmp_path / "program.py"
        file.write_text(PREFIX + program)
        (reply,) = run(
            [request],
            stage="timing",
            time_limit=time_limit,
            threads=1,
            imported=imported,
            programs=[(str(file),)],
        )
        return reply

    return run_one


def test_json_in_json_out(ran: Ran) -> None:
    reply = ran("open(path, 'w').write(json.dumps({'twice': 2 * request['number']}))", number=21)
    assert reply.fault is None
    assert reply.document == {"twice": 42}


def test_threads_are_set_before_anything_is_imported(ran: Ran) -> None:
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
def test_ends_that_are_not_well(ran: Ran, program: str, kind: str, words: str) -> None:
    fault = ran(program).fault
    assert fault is not None
    assert (fault.stage, fault.kind) == ("timing", kind)
    assert words in fault.message


def test_a_request_may_be_longer_than_a_pipe_holds(ran: Ran) -> None:
    reply = ran("open(path, 'w').write(json.dumps({'length': len(request['words'])}))", words="x" * 200_000)
    assert reply.document == {"length": 200_000}


def test_a_hang_ends_with_all_that_it_started(ran: Ran, tmp_path: Path) -> None:
    note = tmp_path / "child"
    program = (
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(note)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)"
    )
    fault = ran(program, time_limit=3.0).fault
    assert fault is not None
    assert fault.kind == "timed-out"
    pid = int(note.read_text())
    for _ in range(200):
        if not _lives(pid):
            return
        time.sleep(0.05)
    pytest.fail("the hanging process left a child behind")


NOTING = """
def note(what):
    with open(request['notes'], 'a') as notes:
        notes.write(f"{request['name']} {what}\\n")
"""


@pytest.fixture
def together(imported: tuple[str, ...], tmp_path: Path) -> Together:
    """Processes that take turns; they write into one file what they do."""

    def run_all(programs: dict[str, str], *, time_limit: float = 60.0) -> dict[str, Reply]:
        files = {name: tmp_path / f"{name}.py" for name in programs}
        for name, program in programs.items():
            files[name].write_text(PREFIX + NOTING + program)
        replies = run(
            [{"name": name, "notes": str(tmp_path / "notes")} for name in programs],
            stage="timing 1",
            time_limit=time_limit,
            threads=1,
            order=random.Random(0),
            imported=imported,
            programs=[(str(file),) for file in files.values()],
        )
        return dict(zip(programs, replies, strict=True))

    return run_all


def working(samples: int) -> str:
    """A process that begins and ends each of its samples while no other does."""
    sample = "note('begins'); time.sleep(0.02); note('ends')\n"
    return (TURN + sample) * samples + "open(path, 'w').write(json.dumps({'name': request['name']}))"


def test_processes_take_turns_in_random_order(together: Together, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    replies = together({name: working(6) for name in "abc"})
    assert {name: reply.document for name, reply in replies.items()} == {n: {"name": n} for n in "abc"}
    lines = notes.read_text().split("\n")[:-1]
    begun, ended = lines[::2], lines[1::2]
    assert [line.replace("begins", "ends") for line in begun] == ended
    order = "".join(line[0] for line in begun)
    rounds = [order[at : at + 3] for at in range(0, 18, 3)]
    assert all(sorted(found) == ["a", "b", "c"] for found in rounds)
    assert len(set(rounds)) > 1


def test_turns_begin_when_all_have_come_to_wait(together: Together, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    slow = "time.sleep(1); note('imported')\n" + working(1)
    together({"a": working(1), "b": slow})
    assert notes.read_text().split("\n")[0] == "b imported"


def test_who_ends_early_or_never_leaves_the_turns_to_the_others(together: Together, tmp_path: Path) -> None:
    programs = {
        "a": working(4),
        "killed": TURN + "os.kill(os.getpid(), 9)",
        "short": working(1),
        "hangs": TURN + "time.sleep(600)",
        "never": "time.sleep(600)",
    }
    replies = together(programs, time_limit=2.5)
    assert replies["a"].fault is None
    assert replies["short"].document == {"name": "short"}
    kinds = {name: reply.fault.kind for name, reply in replies.items() if reply.fault is not None}
    assert kinds == {"killed": "killed", "hangs": "timed-out", "never": "timed-out"}
    assert (tmp_path / "notes").read_text().count("a ends") == 4


def test_copies_are_made_of_one_process_that_has_imported(
    together: Together, imported: tuple[str, ...]
) -> None:
    told = "found = {'parent': os.getppid()}\n" + TURN
    replies = together(dict.fromkeys("ab", told + "open(path, 'w').write(json.dumps(found))"))
    assert all(reply.fault is None for reply in replies.values())
    parents = {reply.document["parent"] for reply in replies.values()}
    assert len(parents) == 1
    assert (os.getpid() in parents) is not bool(imported)


def test_modules_that_are_not_there_are_said(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("pass")
    replies = run(
        [{}, {}],
        stage="timing",
        time_limit=60.0,
        threads=1,
        imported=("a_module_that_is_not_there",),
        programs=[(str(program),)] * 2,
    )
    messages = [reply.fault.message for reply in replies if reply.fault is not None]
    assert len(messages) == 2
    assert "a_module_that_is_not_there" in messages[0]


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    # An ended process that nobody has waited for yet still has a number.
    return not state.is_file() or ") Z" not in state.read_text()
