"""Rates, timed in every launch at the experiment's own shape or at a further one."""

import re
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from compress.bench.metrics import Metric, Quantity, Stage, Subject
from compress.core.errors import UsageError
from compress.core.measurement import Measurement
from compress.runtimes import Session

if TYPE_CHECKING:
    from torch import Tensor

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


def rates_of(stem: str, unit: str) -> tuple[Quantity, ...]:
    """The quantities of a throughput: at the experiment's own shape, and at any further one."""
    name = f"{unit.partition('/')[0]}s_per_second"
    return (
        Quantity(f"{stem}.{name}", stem, unit, "higher"),
        Quantity(f"{stem}.*.{name}", stem, unit, "higher"),
    )


class Throughput(Metric):
    """How much a second. A subclass says what is done in an iteration.

    Args:
        shape: a further shape, ``8x512``; without one, the experiment's own.
    """

    stage = Stage.TIMING

    def __init__(self, shape: str = "") -> None:
        own, further = type(self).quantities
        self._shape = Shape.of(shape) if shape else None
        self.quantities = (further.of(shape) if shape else own,)

    def measure(self, subject: Subject) -> dict[str, Measurement]:
        """A warm-up, and then the timed iterations, all at the same shape."""
        (rate,) = self.quantities
        shape, material = self._shape, subject.given
        prompts = material.prompts if shape is None else material.prompts_of(shape.batch, shape.length)
        iterate = self.iteration(subject, prompts)
        iterate()
        rates = []
        for _ in range(subject.options.repeats):
            done, seconds = iterate()
            wanted = self.amount(subject, prompts)
            if done != wanted:
                return {rate.name: rate.missing(f"gave {done} instead of {wanted} ({rate.unit})")}
            rates.append(done / seconds)
        conditions = self.conditions(subject, prompts)
        return {rate.name: rate.sampled(rates, "geometric-mean", conditions=conditions)}

    @abstractmethod
    def iteration(self, subject: Subject, prompts: "Tensor") -> Callable[[], tuple[int, float]]:
        """What is done again and again: it gives how much was done, and the seconds that it took."""

    @abstractmethod
    def amount(self, subject: Subject, prompts: "Tensor") -> int:
        """How much an iteration has to do, in the unit of the rate."""

    @abstractmethod
    def conditions(self, subject: Subject, prompts: "Tensor") -> dict[str, Any]:
        """The shape, for the record."""


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
