"""How long something took: by the wall clock, and on a GPU by the device's own clock beside it.

A device works on behind the caller's back, so it is waited for before a clock starts and before it stops.
If that waiting did not work (a runtime with streams of its own, a forgotten synchronisation), the wall
clock measures how fast work is handed over, not how fast it is done. CUDA events are stamped by the device
itself, in the order of its work; around a region that is truly synchronised both clocks say the same.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar, final

if TYPE_CHECKING:
    from compress.runtimes import Session

T = TypeVar("T")

CLOCK_SHARE: Final = 0.05
"""Share of the wall time by which the two clocks may differ."""
CLOCK_SLACK: Final = 200e-6
"""Seconds by which they may differ whatever the time: handing over the first kernel, noticing the last."""


@dataclass(frozen=True)
class Timing:
    """Seconds that some work took.

    Attributes:
        seconds: by the wall clock; this is what rates are made of.
        device_seconds: by the device's clock; none where the processor itself does the work.
    """

    seconds: float
    device_seconds: float | None = None

    @property
    def disagreement(self) -> str | None:
        """Why the two clocks cannot both be right, or nothing."""
        if self.device_seconds is None:
            return None
        apart = abs(self.seconds - self.device_seconds)
        if apart <= max(CLOCK_SLACK, CLOCK_SHARE * self.seconds):
            return None
        return (
            f"clock disagreement: {1e3 * self.seconds:.3g} ms by the wall clock, "
            f"{1e3 * self.device_seconds:.3g} ms by CUDA events"
        )


class Clock(ABC):
    """Times work on a session."""

    @abstractmethod
    def time(self, session: "Session", work: Callable[[], T]) -> tuple[Timing, T]:
        """What some work took, the device's own part included, and what it gave."""


@final
class WallClock(Clock):
    """The system's monotonic clock alone."""

    def time(self, session: "Session", work: Callable[[], T]) -> tuple[Timing, T]:
        """See `Clock.time`."""
        session.synchronize()
        start = time.perf_counter()
        result = work()
        session.synchronize()
        return Timing(time.perf_counter() - start), result


@final
class CudaClock(Clock):
    """The wall clock, and CUDA events on the stream that the work is on.

    Args:
        new_event: makes an event that keeps the time, as ``torch.cuda.Event(enable_timing=True)``.
    """

    def __init__(self, new_event: Callable[[], Any]) -> None:
        self._new_event = new_event

    def time(self, session: "Session", work: Callable[[], T]) -> tuple[Timing, T]:
        """See `Clock.time`."""
        first, last = self._new_event(), self._new_event()
        session.synchronize()
        start = time.perf_counter()
        first.record()
        result = work()
        last.record()
        session.synchronize()
        seconds = time.perf_counter() - start
        # Were the session not synchronised, the events would not have come to pass yet.
        last.synchronize()
        return Timing(seconds, first.elapsed_time(last) / 1e3), result


def clock_of(session: "Session") -> Clock:
    """The clock for a session, by the device that it says it runs on."""
    if not str(session.facts.get("device", "")).startswith("cuda"):
        return WallClock()
    import torch

    return CudaClock(lambda: torch.cuda.Event(enable_timing=True))
