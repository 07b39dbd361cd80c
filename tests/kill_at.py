"""Runs a command line and kills its own process at a chosen event, as a power cut would.

The process gets SIGKILL while it speaks to its reporter, so no handler, no ``finally`` and no buffer of
Python gets a chance. Which event it is decides what is left on disk, whatever the speed of the machine.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import final

from compress.core.events import Reporter

ANY = "*"


@final
class Recorder(Reporter):
    """Writes every event to a file, and kills the process at one of them.

    Args:
        log: gets one JSON object an event.
        name: the event to die at, or ``*`` for any.
        number: which of these events, from 1; 0 to live.
    """

    def __init__(self, log: Path, name: str = ANY, number: int = 0) -> None:
        self._log = log
        self._name = name
        self._left = number

    def event(self, name: str, **facts: object) -> None:
        with self._log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"name": name, **facts}) + "\n")
        if self._name in (ANY, name):
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def message(self, text: str) -> None: ...

    def begin(self, title: str, total: int, unit: str) -> None: ...

    def advance(self, by: int = 1) -> None: ...

    def end(self) -> None: ...


def run(command: list[str], log: Path, name: str = ANY, number: int = 0) -> None:
    """Run a command line in this process with a `Recorder`, and leave with its exit code.

    What the command prints goes into a file beside the log.
    """
    with log.with_suffix(".out").open("a", encoding="utf-8") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    from compress.cli import start
    from compress.cli.app import main

    start.reporter_for = lambda **_: Recorder(log, name, number)
    code = main(command)
    sys.stdout.flush()
    sys.exit(code)
