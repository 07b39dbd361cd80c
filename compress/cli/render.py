"""How a run is shown: progress bars on a terminal, plain lines elsewhere, JSON lines for machines.

Progress and messages go to standard error and results to standard output, so that a pipe carries
results alone. With ``--json`` everything goes to standard output, one JSON object a line.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO, final

from compress.core.events import SILENT, Reporter

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

Clock = Callable[[], float]

PLAIN_PERIOD = 10.0
"""Seconds between two lines of one piece of work in a plain log."""
JSON_PERIOD = 1.0
"""Seconds between two progress objects of one piece of work in a JSON log."""
NOTE = "progress.note"
"""An event that says in its ``text`` how the innermost piece of work is doing, beside how far it is."""


class ReaderLeft(Exception):
    """Whoever read the log is gone (``| head``), so the run ends.

    No `OSError`, because whoever works would take that for a fault of the disk.
    """


def reporter_for(*, machine: bool, quiet: bool, stream: TextIO | None = None) -> Reporter:
    """The reporter that fits the flags and the stream.

    Args:
        machine: ``--json`` was given.
        quiet: ``--quiet`` was given; a machine's log is not silenced by it.
        stream: where progress goes for people; standard error by default.
    """
    if machine:
        return JsonReporter(sys.stdout)
    if quiet:
        return SILENT
    stream = sys.stderr if stream is None else stream
    return RichReporter(stream) if stream.isatty() else PlainReporter(stream)


@dataclass
class _Work:
    """One piece of work under way; times in seconds of the reporter's clock."""

    title: str
    total: int
    unit: str
    started: float
    told: float
    done: int = 0
    note: str = ""

    def rate(self, now: float) -> float:
        """Units a second so far."""
        return self.done / max(now - self.started, 1e-9)

    def left(self, now: float) -> float | None:
        """Predicted seconds to the end, or ``None`` before anything is done."""
        return (self.total - self.done) / self.rate(now) if self.done else None


@final
class PlainReporter(Reporter):
    """Lines without control characters: for log files and pipelines."""

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._stack: list[_Work] = []

    def event(self, name: str, **facts: object) -> None:
        """Events are for machines; a person reads messages and progress, with the newest note on it."""
        if name == NOTE and self._stack:
            self._stack[-1].note = str(facts.get("text", ""))

    def message(self, text: str) -> None:
        """Print the line."""
        self._line(text)

    def begin(self, title: str, total: int, unit: str) -> None:
        """Announce the outermost piece of work; inner ones speak up when they take long."""
        now = self._clock()
        if not self._stack:
            self._line(f"{title}: {_count(total, unit)}")
        self._stack.append(_Work(title, total, unit, now, now))

    def advance(self, by: int = 1) -> None:
        """Count, and print a line when the last one is some seconds old."""
        work, now = self._stack[-1], self._clock()
        work.done += by
        if now - work.told >= PLAIN_PERIOD:
            work.told = now
            left = work.left(now)
            parts = [
                f"{work.title}: {work.done}/{_count(work.total, work.unit)}",
                speed(work.rate(now), work.unit),
                *([] if left is None else [f"{duration(left)} left"]),
                *([work.note] if work.note else []),
            ]
            self._line(", ".join(parts))

    def end(self) -> None:
        """Sum up the outermost piece of work, or say where it stopped."""
        work = self._stack.pop()
        if not self._stack:
            took = duration(self._clock() - work.started)
            whole = work.done >= work.total
            said = f"{work.done} done in" if whole else f"stopped at {work.done}/{work.total} after"
            self._line(f"{work.title}: {said} {took}")

    def _line(self, text: str) -> None:
        _write_line(self._stream, text)


@final
class JsonReporter(Reporter):
    """One JSON object a line, each with ``event`` and ``seconds`` since the start."""

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._started = clock()
        self._stack: list[_Work] = []

    def event(self, name: str, **facts: object) -> None:
        """Write the event with its facts."""
        self._write(name, facts)

    def message(self, text: str) -> None:
        """Write the line as an event ``message``."""
        self._write("message", {"text": text})

    def begin(self, title: str, total: int, unit: str) -> None:
        """Write ``progress.begin``."""
        now = self._clock()
        self._stack.append(_Work(title, total, unit, now, now))
        self._write("progress.begin", {"title": title, "total": total, "unit": unit})

    def advance(self, by: int = 1) -> None:
        """Write ``progress`` with rate and predicted seconds left, about once a second."""
        work, now = self._stack[-1], self._clock()
        work.done += by
        if now - work.told >= JSON_PERIOD:
            work.told = now
            facts = {"title": work.title, "done": work.done, "total": work.total, "unit": work.unit}
            self._write("progress", {**facts, "rate": work.rate(now), "seconds_left": work.left(now)})

    def end(self) -> None:
        """Write ``progress.end``."""
        work = self._stack.pop()
        self._write("progress.end", {"title": work.title, "done": work.done, "total": work.total})

    def _write(self, name: str, facts: Any) -> None:
        record = {"event": name, "seconds": round(self._clock() - self._started, 3), **facts}
        _write_line(self._stream, json.dumps(record, default=str))


@final
class RichReporter(Reporter):
    """Progress bars with rate and predicted time to the end, on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._console: Console | None = None
        self._progress: Progress | None = None
        self._stack: list[TaskID] = []

    def event(self, name: str, **facts: object) -> None:
        """Events are for machines; a person sees the bars, and behind the innermost its newest note."""
        if name == NOTE and self._stack and self._progress is not None:
            self._progress.update(self._stack[-1], note=str(facts.get("text", "")))

    def message(self, text: str) -> None:
        """Print the line above the bars."""
        self._terminal().print(text, markup=False, highlight=False)

    def begin(self, title: str, total: int, unit: str) -> None:
        """Add a bar below those of the outer pieces of work."""
        if self._progress is None:
            self._progress = _bars(self._terminal())
            self._progress.start()
        title = "  " * len(self._stack) + title
        self._stack.append(self._progress.add_task(title, total=total, unit=unit, note=""))

    def advance(self, by: int = 1) -> None:
        """Move the innermost bar."""
        if self._progress is not None:
            self._progress.advance(self._stack[-1], by)

    def end(self) -> None:
        """Take the innermost bar away; the outermost stays as a record of its time."""
        task = self._stack.pop()
        if self._progress is None:
            return
        if self._stack:
            self._progress.remove_task(task)
        else:
            self._progress.stop()
            self._progress = None

    def _terminal(self) -> "Console":
        if self._console is None:
            from rich.console import Console

            self._console = Console(file=self._stream)
        return self._console


def _write_line(stream: TextIO, line: str) -> None:
    try:
        stream.write(line + "\n")
        stream.flush()
    except BrokenPipeError as error:
        raise ReaderLeft from error


def _bars(console: "Console") -> "Progress":
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    @final
    class SpeedColumn(ProgressColumn):
        """Units a second."""

        def render(self, task: Task) -> Text:
            rate = task.finished_speed or task.speed
            return Text("" if rate is None else speed(rate, str(task.fields["unit"])))

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        SpeedColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
    )


def speed(rate: float, unit: str) -> str:
    """A rate for people; slow ones as seconds a unit."""
    if 0 < rate < 1:
        return f"{1 / rate:.1f} s/{unit}"
    return f"{rate:.1f} {unit}/s"


def duration(seconds: float) -> str:
    """A span of time for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """A number of bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _count(total: int, unit: str) -> str:
    return f"{total} {unit}" if total == 1 or unit.endswith("s") else f"{total} {unit}s"
