"""Starts Python programs as copies of one process that has imported what all of them need.

Imports take seconds of a processor for each process, more than most of what is measured. Here they are paid
once for a round: a fresh interpreter imports, and forks a copy for each program. A copy has modules in memory
and nothing more; no model was loaded before, nothing was computed, no thread pool was started. Why a copy
counts as a fresh process, and where it does not (memory is measured in processes that are started one by
one), says docs/decisions/0022.

Run as ``python -m compress.bench.nursery``, told what to do by a line on its standard input (`Nursery`).
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self, final

_WAIT_SECONDS: Final = 0.5


@final
@dataclass(frozen=True)
class Program:
    """A Python program and what it is connected to.

    Attributes:
        arguments: what a Python interpreter is given: ``-m``, a module and its arguments, or a file and its.
        input: file descriptor of its standard input.
        output: file for all that it prints.
        kept: file descriptor that it finds open under the same number.
    """

    arguments: Sequence[str]
    input: int
    output: str
    kept: int


@final
class Copy:
    """One of the copies; like `subprocess.Popen`, it is asked whether it has ended."""

    def __init__(self, nursery: "Nursery", number: int) -> None:
        self._nursery = nursery
        self._number = number

    def poll(self) -> int | None:
        """How it ended, as a `Popen` says it; ``None`` as long as it runs."""
        return self._nursery.code(self._number)

    def wait(self, timeout: float | None = None) -> int:
        """How it ended, as soon as it has.

        Raises:
            subprocess.TimeoutExpired: it runs on.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while (code := self._nursery.code(self._number, _left(until))) is None:
            if until is not None and time.monotonic() >= until:
                raise subprocess.TimeoutExpired("a copy", timeout or 0.0)
        return code

    def kill(self) -> None:
        """End it with all that it started."""
        self._nursery.kill(self._number)


@final
class Nursery:
    """The process that imports, and its copies; all of them end with it.

    Args:
        programs: what is run, each in a copy.
        modules: that are imported before.
        environment: of all of them.
        words: file for what is said before there are copies.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        modules: Sequence[str],
        environment: Mapping[str, str],
        words: Path,
    ) -> None:
        self._pids: dict[int, int] = {}
        self._codes: dict[int, int] = {}
        self._heard = b""
        self._news, theirs = os.pipe()
        try:
            with words.open("wb") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "compress.bench.nursery"],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    pass_fds=[theirs, *(one for each in programs for one in (each.input, each.kept))],
                )
        finally:
            os.close(theirs)
        order = {
            "modules": list(modules),
            "programs": [asdict(program) for program in programs],
            "news": theirs,
            "parent": os.getpid(),
        }
        with contextlib.suppress(BrokenPipeError), _pipe(self._process.stdin) as stdin:
            stdin.write(f"{json.dumps(order)}\n".encode())
        self.copies = [Copy(self, number) for number in range(len(programs))]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in range(len(self.copies)):
            self.kill(number)
        _kill(self._process.pid)
        self._process.wait()
        os.close(self._news)

    def code(self, number: int, seconds: float = 0.0) -> int | None:
        """How a copy ended; where that is not known yet, what is known after some seconds at most."""
        if number not in self._codes:
            self._listen(seconds)
        return self._codes.get(number)

    def kill(self, number: int) -> None:
        """End a copy, or before there are copies all of it."""
        if number in self._codes:
            return
        _kill(self._pids.get(number, self._process.pid))

    def _listen(self, seconds: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._news, selectors.EVENT_READ)
            if not selector.select(seconds):
                return
        found = os.read(self._news, 1 << 16)
        if not found:
            # It has ended, and so before its copies: of those that were never made it says how they ended.
            code = self._process.wait()
            for number in range(len(self.copies)):
                self._codes.setdefault(number, code)
            return
        *lines, self._heard = (self._heard + found).split(b"\n")
        for line in lines:
            what, copy, value = line.split()
            (self._pids if what == b"begins" else self._codes)[int(copy)] = int(value)


def _left(until: float | None) -> float:
    return _WAIT_SECONDS if until is None else min(_WAIT_SECONDS, max(0.0, until - time.monotonic()))


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise ValueError("the process was started without a pipe to its standard input")
    return stream


def _kill(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def end_with(parent: int) -> None:
    """End this process when the one that started it is gone: nobody waits for it any more."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WAIT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Import, fork, and say how the copies end; in a copy, be its program."""
    order = json.loads(sys.stdin.readline())
    for module in order["modules"]:
        importlib.import_module(module)
    # What is here stays here: no copy looks through it, which would make the pages its own.
    gc.freeze()
    news = order["news"]
    programs = [Program(**program) for program in order["programs"]]
    numbers: dict[int, int] = {}
    for number, program in enumerate(programs):
        sys.stdout.flush()
        sys.stderr.flush()
        copy = os.fork()
        if copy == 0:
            os.setpgid(0, 0)
            _be(program, [news, *_ends(programs, but=program)])
            return
        # On both sides, because nobody knows who comes first.
        with contextlib.suppress(OSError):
            os.setpgid(copy, copy)
        numbers[copy] = number
        _say(news, "begins", number, copy)
    for descriptor in _ends(programs):
        os.close(descriptor)
    end_with(order["parent"])
    while numbers:
        ended, status = os.wait()
        _say(news, "ended", numbers.pop(ended), os.waitstatus_to_exitcode(status))


def _ends(programs: Sequence[Program], but: Program | None = None) -> list[int]:
    return [end for program in programs if program is not but for end in (program.input, program.kept)]


def _say(news: int, what: str, number: int, value: int) -> None:
    os.write(news, f"{what} {number} {value}\n".encode())


def _be(program: Program, foreign: Sequence[int]) -> None:
    """Run a program in this process, connected to its own input and output alone."""
    for descriptor in foreign:
        os.close(descriptor)
    output = os.open(program.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor, standard in ((program.input, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, standard)
    os.close(output)
    os.close(program.input)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - for as long as the process lives
    first, *rest = program.arguments
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    main()
