"""Rates, timed in every launch at the experiment's own shape or at a further one."""

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from compress.bench.clock import Timing
from compress.bench.metrics import Metric, Quantity, Stage, Subject
from compress.core.bench import Bench
from compress.core.errors import UsageError
from compress.core.measurement import Measurement

if TYPE_CHECKING:
    from torch import Tensor


MOST_SAMPLES: Final = 40


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


def _samples(options: Bench, seconds: float) -> int:
    """How many samples a launch takes, where an iteration takes so many seconds.

    Noise between samples that lie close together is averaged out by taking more of them.
    """
    sample = max(seconds, options.sample_seconds, 1e-9)
    return max(options.repeats, min(math.ceil(options.launch_seconds / sample), MOST_SAMPLES))


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
        self._shape = Shape.of(shape) if shape else None
        self.quantities = tuple(
            quantity.of(shape) if shape else quantity
            for quantity in type(self).quantities
            if ("*" in quantity.name) == bool(shape)
        )

    def measure(self, subject: Subject) -> dict[str, Measurement]:
        """A warm-up, and then the timed samples, all at the same shape; each is a turn of its own.

        A sample is as many iterations as it takes to fill its least time: a single short one would say
        more about the machine at that moment than about the model. While others had their turn the caches
        were theirs, so where iterations are short each sample is preceded by one that does not count.
        """
        rate = self.quantities[0]
        shape, material = self._shape, subject.given
        prompts = material.prompts if shape is None else material.prompts_of(shape.batch, shape.length)
        iterate = self.iteration(subject, prompts)
        subject.take_turn()
        _, first = iterate()
        rates, timings = [], []
        doubts: dict[str, str] = {}
        wanted = self.amount(subject, prompts)
        least = subject.options.sample_seconds
        for _ in range(_samples(subject.options, first.seconds)):
            subject.take_turn()
            if first.seconds < least:
                iterate()
            amount, seconds = 0, 0.0
            while seconds < least or seconds == 0:
                done, timing = iterate()
                timings.append(timing)
                amount, seconds = amount + done, seconds + timing.seconds
                if timing.disagreement is not None:
                    doubts.setdefault("clocks", timing.disagreement)
                if done != wanted:
                    doubts.setdefault("work", f"a shortened output: {done} instead of {wanted} ({rate.unit})")
                    break
            if amount > 0:
                rates.append(amount / seconds)
        if any(timing.device_seconds is not None for timing in timings):
            subject.observed[rate.name] = {
                "wall_seconds": [timing.seconds for timing in timings],
                "device_seconds": [timing.device_seconds for timing in timings],
            }
        conditions = self.conditions(subject, prompts)
        found = {rate.name: rate.sampled(rates, "geometric-mean", conditions=conditions)}
        further, more = self.checked(subject, prompts, rates)
        found |= further
        if not (doubts or more):
            return found
        reason = "; ".join([*doubts.values(), *more])
        return {name: measurement.doubted(reason) for name, measurement in found.items()}

    @abstractmethod
    def iteration(self, subject: Subject, prompts: "Tensor") -> Callable[[], tuple[int, Timing]]:
        """What is done again and again: it gives how much was done, and how long that took."""

    @abstractmethod
    def amount(self, subject: Subject, prompts: "Tensor") -> int:
        """How much an iteration has to do, in the unit of the rate."""

    @abstractmethod
    def checked(
        self, subject: Subject, prompts: "Tensor", rates: Sequence[float]
    ) -> tuple[dict[str, Measurement], list[str]]:
        """Further quantities that follow from the rates, and why the rates cannot be."""

    @abstractmethod
    def conditions(self, subject: Subject, prompts: "Tensor") -> dict[str, Any]:
        """The shape, for the record."""
