"""The clock of the timed metrics, and the shapes at which they are taken."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from compress.core.errors import UsageError
from compress.runtimes import Session

if TYPE_CHECKING:
    from torch import Tensor

    from compress.bench.metrics import Subject

T = TypeVar("T")


@dataclass(frozen=True)
class Shape:
    """How many sequences of how many tokens are timed at once."""

    batch: int
    length: int

    @classmethod
    def of(cls, text: str) -> "Shape":
        """The shape that ``8x512`` spells.

        Raises:
            UsageError: it spells none.
        """
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if found is None:
            raise UsageError(f"'{text}' is no shape to time", "write BATCHxPROMPT, such as 8x512")
        return cls(int(found[1]), int(found[2]))


def prompts_at(subject: "Subject", shape: Shape | None) -> "Tensor":
    """The prompts of a further shape, or those of the experiment's own."""
    material = subject.given
    return material.prompts if shape is None else material.prompts_of(shape.batch, shape.length)


def timed(session: Session, work: Callable[[], T]) -> tuple[float, T]:
    """Seconds that some work took, the device's own included, and what it gave.

    A device works on behind the caller's back, so it is waited for before the clock starts and before it
    stops.
    """
    session.synchronize()
    start = time.perf_counter()
    result = work()
    session.synchronize()
    return time.perf_counter() - start, result
