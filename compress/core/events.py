"""What a run says while it works.

Passes and the engine speak to a `Reporter`; whoever started the run decides how it is shown: progress
bars on a terminal, plain lines elsewhere, JSON lines for machines, or nothing for a library call. An
event is emitted *before* the work that it names.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, final


class Reporter(ABC):
    """Receives the events and the progress of a run."""

    @abstractmethod
    def event(self, name: str, **facts: object) -> None:
        """Something is about to happen: ``name`` is dotted (``block.solve``), ``facts`` are scalars."""

    @abstractmethod
    def message(self, text: str) -> None:
        """One line for a person."""

    @abstractmethod
    def begin(self, title: str, total: int, unit: str) -> None:
        """A piece of long work of ``total`` units starts; pieces may nest."""

    @abstractmethod
    def advance(self, by: int = 1) -> None:
        """The innermost piece of work moved on."""

    @abstractmethod
    def end(self) -> None:
        """The innermost piece of work is over."""

    @contextmanager
    def progress(self, title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Show progress while the block runs; yields the function that advances it."""
        self.begin(title, total, unit)
        try:
            yield self.advance
        finally:
            self.end()


@final
class Silent(Reporter):
    """Shows nothing; the default of a library call."""

    def event(self, name: str, **facts: object) -> None:
        """Ignore the event."""

    def message(self, text: str) -> None:
        """Ignore the line."""

    def begin(self, title: str, total: int, unit: str) -> None:
        """Ignore the start."""

    def advance(self, by: int = 1) -> None:
        """Ignore the step."""

    def end(self) -> None:
        """Ignore the end."""


SILENT: Final = Silent()
