"""Where a program's time goes: its functions are wrapped with timers, from outside.

Each thread has a stack of regions, and time goes to the innermost: what a hook does inside a forward pass
is not the forward's. Seconds are of the thread's processor time, which other work on the machine hardly
changes; so torch must work with one thread, for what its own threads do would be seen by none of ours.
Only the standard library is needed here.
"""

import inspect
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any


class Regions:
    """Processor seconds by the name of a region."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def wrap(self, owner: Any, name: str, region: str) -> None:
        """Count every call of a function, a method or a static method of `owner` as `region`."""
        held = inspect.getattr_static(owner, name)
        static = isinstance(held, staticmethod)
        function: Callable[..., Any] = held.__func__ if static else held

        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.within(region):
                return function(*arguments, **options)

        setattr(owner, name, staticmethod(timed) if static else timed)

    @contextmanager
    def within(self, region: str) -> Iterator[None]:
        """Count what happens inside as `region`, but for what an inner region takes."""
        stack: list[str] = self._local.__dict__.setdefault("stack", [])
        self._charge(stack)
        stack.append(region)
        try:
            yield
        finally:
            self._charge(stack)
            stack.pop()

    def clear(self) -> None:
        """Forget what was counted; no region may be open."""
        with self._lock:
            self.seconds.clear()

    def _charge(self, stack: list[str]) -> None:
        """Give the time since the last change to the innermost region of this thread."""
        now = time.thread_time()
        if stack:
            with self._lock:
                self.seconds[stack[-1]] = self.seconds.get(stack[-1], 0.0) + now - self._local.mark
        self._local.mark = time.thread_time()
