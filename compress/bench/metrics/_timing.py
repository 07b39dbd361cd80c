"""The clock of the timed metrics."""

import time
from collections.abc import Callable
from typing import TypeVar

from compress.runtimes import Session

T = TypeVar("T")


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
