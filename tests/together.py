"""Several processes that train together, as a launcher would start them, for tests.

They are forked from a process that has imported everything and computes nothing.
"""

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import kill_at

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "compress.cli.app",
        "compress.engine",
        "compress.runtimes.torch_eager",
        "compress.training.loop",
        "tests.models_zoo",
    ]
)
LIMIT = 240
"""Seconds after which a process that has not ended is a failure: against a hanging test, and no measure."""


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What a launcher says to one of its processes."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run(count: int, target: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Run a function in as many processes, each with its environment; their exit codes.

    Args:
        target: importable by its name.
        arguments: of the function, the same in all processes.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    processes = [
        PROCESSES.Process(target=_begin, args=(environment(rank, count, port), target, arguments))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _begin(said: dict[str, str], target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(said)
    target(*arguments)


def command(words: list[str], log: Path, kill: tuple[int, int] = (-1, 0)) -> None:
    """A command line in one of the processes; what it prints goes to a file of its own.

    Args:
        words: the command line.
        log: gets the events, and names the files of what is printed: ``log.0.out``, ``log.1.out``.
        kill: a process, and the step of the training before which it gets SIGKILL.
    """
    rank = int(os.environ["RANK"])
    if rank == kill[0]:
        from compress.training.loop import Loop

        step = Loop._step

        def dying(self: Loop, number: int, rate: float) -> tuple[dict[str, float], float]:
            if number + 1 == kill[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, number, rate)

        Loop._step = dying  # type: ignore[method-assign, assignment]
    kill_at.run(words, log.with_name(f"{log.name}.{rank}.jsonl"))


def output(log: Path, rank: int) -> str:
    """What a process printed."""
    return log.with_name(f"{log.name}.{rank}.out").read_text()
