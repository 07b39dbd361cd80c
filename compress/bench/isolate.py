"""Measurements in processes of their own: JSON in, JSON out; several may take turns.

Whatever happens to a candidate (it crashes in native code, is killed, runs out of memory, hangs) happens
to its process alone and becomes a row that says so; the other arms stand. A fresh process is also the only
honest start of a timing: no allocator, cache or thread pool is warm from the arm before.

Processes that are run together take turns. Each imports what it needs, says that it is ready, and waits;
from then on one of them works at a time and all others are blocked. So samples that are to be compared lie
as near in time as they can, and a machine that drifts slows them alike. What all of them import may be
imported once, in a process of which they are copies (`compress.bench.nursery`).
"""

import contextlib
import json
import os
import random
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, final

from compress.bench import cgroup
from compress.bench.nursery import Copy, Nursery, Program
from compress.bench.results import Fault

WORKER: Final = ("-m", "compress.bench.worker")
"""What a Python interpreter is given."""
_TAIL: Final = 2_000
"""Characters of a dying process's last words that are kept."""
_POLL_SECONDS: Final = 0.1
_THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        document: the worker's answer; empty where it gave none.
        fault: how the process ended, if not well.
    """

    document: Mapping[str, Any] = field(default_factory=dict)
    fault: Fault | None = None


def run(
    requests: Sequence[Mapping[str, Any]],
    *,
    stage: str,
    time_limit: float,
    threads: int,
    order: random.Random | None = None,
    imported: Sequence[str] = (),
    programs: Sequence[Sequence[str]] | None = None,
) -> list[Reply]:
    """Run each request in a fresh process, and wait for all of them; several take turns.

    A process gets its request as the first line of its standard input and the path of its reply as its last
    argument. Its output is kept for the last words of a crash and shown to nobody. The request's ``turns``
    is a file descriptor: a byte written there says that the process waits for its turn, which a further
    line on its standard input gives. Turns begin when all processes wait (or have ended): what is done
    before is done side by side, and whatever follows is done alone.

    Args:
        requests: anything that JSON can say.
        stage: what is measured, for the record.
        time_limit: seconds until a process waits for its first turn, and of each turn; then it and all that
            it started are killed.
        threads: of its arithmetic libraries, set before they are imported.
        order: draws the order of each round of turns; without one it is that of the requests.
        imported: modules that one process imports, of which those of the requests are copies; where there
            are none, or the system cannot fork safely, each is started by itself.
        programs: the worker of each request, as a Python interpreter is given it.
    """
    workers = [WORKER] * len(requests) if programs is None else programs
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(_Process(request, stage, worker))
            for request, worker in zip(requests, workers, strict=True)
        ]
        environment = _environment(threads)
        if imported and sys.platform == "linux":
            nursery = Nursery(
                [process.program for process in processes], imported, environment, processes[0].words
            )
            copies = stack.enter_context(nursery).copies
            for process, copy in zip(processes, copies, strict=True):
                process.runs_as(copy)
        else:
            for process in processes:
                process.runs_as(_started(process.program, environment))
        waiting = [process for process in processes if process.waits(time_limit)]
        while waiting:
            turns = waiting if order is None else order.sample(waiting, len(waiting))
            had = {id(process) for process in turns if process.turn(time_limit)}
            waiting = [process for process in waiting if id(process) in had]
        return [process.reply() for process in processes]


def _environment(threads: int) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        **dict.fromkeys(_THREADS, str(threads)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root,
    }


def _started(program: Program, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    with Path(program.output).open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *program.arguments],
            stdin=program.input,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            pass_fds=(program.kept,),
        )


@final
class _Process:
    """One measured process, until it is left."""

    def __init__(self, request: Mapping[str, Any], stage: str, worker: Sequence[str]) -> None:
        self._stage = stage
        self._cgroup = request.get("cgroup")
        self._late: float | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="compress-bench-")
        self._answer = Path(self._folder.name) / "reply.json"
        self.words = Path(self._folder.name) / "output.txt"
        self.words.touch()
        self._ready, kept = os.pipe()
        given, self._given = os.pipe()
        self.program = Program((*worker, str(self._answer)), given, str(self.words), kept)
        self._request = {**request, "turns": kept}
        self._process: subprocess.Popen[bytes] | Copy | None = None

    def runs_as(self, process: "subprocess.Popen[bytes] | Copy") -> None:
        """From now on this is its process, which gets the request."""
        self._process = process
        os.close(self.program.input)
        os.close(self.program.kept)
        self._say(json.dumps(self._request))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Also when we ourselves are interrupted: nothing may go on running behind.
        if self._process is None:
            os.close(self.program.input)
            os.close(self.program.kept)
        elif self._process.poll() is None:
            self._kill()
        os.close(self._given)
        os.close(self._ready)
        if self._cgroup is not None:
            cgroup.remove(self._cgroup)
        self._folder.cleanup()

    def waits(self, time_limit: float) -> bool:
        """Whether the process comes to wait for its turn; if not, it has ended, by itself or by force."""
        until = time.monotonic() + time_limit
        while (left := until - time.monotonic()) > 0:
            # Its end is looked for as well: what it started may hold the pipe open.
            state = self._state(min(left, _POLL_SECONDS))
            if state != "works":
                return state == "waits"
        self._late = time_limit
        self._kill()
        return False

    def turn(self, time_limit: float) -> bool:
        """Let it work until it waits again; whether it does."""
        self._say("")
        return self.waits(time_limit)

    def reply(self) -> Reply:
        """What came of it, after it has ended."""
        if self._late is not None:
            message = f"no end after {self._late:g} s"
            return Reply(fault=Fault(stage=self._stage, kind="timed-out", message=message))
        return _judged(self._running.wait(), self._answer, self.words, self._stage)

    def _state(self, seconds: float) -> Literal["works", "waits", "ended"]:
        """What it does, as soon as that changes, or after some seconds."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._ready, selectors.EVENT_READ)
            if selector.select(seconds):
                if os.read(self._ready, 1):
                    return "waits"
                # The pipe has ended, so the process is about to.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._running.wait(seconds)
        return "works" if self._running.poll() is None else "ended"

    def _say(self, line: str) -> None:
        # A process that is gone already is judged by how it ended.
        with contextlib.suppress(BrokenPipeError):
            rest = memoryview(f"{line}\n".encode())
            while rest:
                rest = rest[os.write(self._given, rest) :]

    def _kill(self) -> None:
        """End the process and all that it started."""
        if isinstance(self._running, Copy):
            self._running.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._running.pid, signal.SIGKILL)
        self._running.wait()

    @property
    def _running(self) -> "subprocess.Popen[bytes] | Copy":
        if self._process is None:
            raise RuntimeError("the process was not started")
        return self._process


def _judged(code: int, answer: Path, words: Path, stage: str) -> Reply:
    said = words.read_text(encoding="utf-8", errors="replace").strip()[-_TAIL:]
    if code < 0:
        name = signal.Signals(-code).name if -code in signal.Signals._value2member_map_ else f"signal {-code}"
        if -code == signal.SIGKILL:
            message = f"ended by {name}, as the system does to a process that takes too much memory"
            return Reply(fault=Fault(stage=stage, kind="killed", message=message))
        return Reply(fault=Fault(stage=stage, kind="crashed", message=_joined(f"ended by {name}", said)))
    try:
        document = json.loads(answer.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Reply(
            fault=Fault(stage=stage, kind="crashed", message=_joined(f"ended with code {code}", said))
        )
    error = document.get("error")
    if error is not None:
        kind = "out-of-memory" if error["kind"] == "out-of-memory" else "failed"
        return Reply(document, Fault(stage=stage, kind=kind, message=error["message"]))
    return Reply(document)


def _joined(what: str, said: str) -> str:
    last = said.splitlines()[-1] if said else ""
    return f"{what}: {last}" if last else what
