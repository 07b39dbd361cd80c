"""How fast this machine's memory can be read, against which a decoding rate is checked.

Each step of decoding one token reads every weight once, whatever the batch. So a rate implies a bandwidth;
one that the memory cannot give was not measured, whatever the clock says. A copy of a large tensor, read
and written bytes together, is the measure, as in STREAM (McCalpin 1995, "Memory Bandwidth and Machine
Balance in Current High Performance Computers"). It holds where the weights are several times larger than
the last level of cache: what lies in a cache is read faster, and a small model lies there as a whole.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

import torch

from compress.bench import host
from compress.bench.clock import Clock

if TYPE_CHECKING:
    from compress.runtimes import Session

CACHE_MULTIPLE: Final = 4
"""How many times the last level of cache the weights must hold for the limit to apply."""
TOLERANCE: Final = {"cpu": 2.0, "cuda": 1.25}
"""How many times the copy's bandwidth reading alone may reach. A processor reads a line of cache before it
writes to it, which the copy does not count (half as much again), and shares its memory with neighbours."""
_REPEATS: Final = 5
_LEAST: Final = {"cpu": 2**26, "cuda": 2**30}
"""Bytes of the copied tensor at least: a copy lasts long against the starting of it."""
_SHARE: Final = 1 / 8
"""Of the free memory, the most that the copied tensor may take."""


@dataclass(frozen=True)
class Probe:
    """The memory of one device.

    Attributes:
        device: ``cpu`` or ``cuda``, with an index or without.
        clock: of the sessions there.
        session: what is waited for before and after a copy.
    """

    device: str
    clock: Clock
    session: "Session"

    @property
    def kind(self) -> str:
        """The device without its index."""
        return self.device.partition(":")[0]

    @cached_property
    def cache_bytes(self) -> int | None:
        """Bytes of the last level of cache, where they are known."""
        if self.kind == "cuda":
            return int(torch.cuda.get_device_properties(self.device).L2_cache_size)
        return host.cache_bytes() if self.kind == "cpu" else None

    @cached_property
    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of the fastest of some copies; each session measures it once."""
        return self.measure()

    def obstacle(self, read_bytes: int) -> str | None:
        """Why reading so many bytes in each step has no limit here, or nothing."""
        if self.cache_bytes is None:
            return "the size of the last level of cache is not known here"
        if read_bytes < CACHE_MULTIPLE * self.cache_bytes:
            return (
                f"{_megabytes(read_bytes)} of weights are less than {CACHE_MULTIPLE} times the cache of "
                f"{_megabytes(self.cache_bytes)}, so memory is no limit"
            )
        if self._size() < self.cache_bytes:
            return "too little memory is free for a copy that no cache holds"
        return None

    def measure(self) -> float:
        """Copy, and give the bytes a second of the fastest copy."""
        count = self._size() // 4
        # Filled, because untouched pages are all the same one, and that is in a cache.
        source = torch.ones(count, dtype=torch.float32, device=self.device)
        target = torch.zeros_like(source)
        fastest = 0.0
        for _ in range(_REPEATS):
            timing, _ = self.clock.time(self.session, lambda: target.copy_(source))
            fastest = max(fastest, 8 * count / (timing.device_seconds or timing.seconds))
        return fastest

    def excess(self, read_bytes: int, steps_per_second: float) -> str | None:
        """Why a rate is above the physical limit, or nothing.

        Args:
            read_bytes: weights that each step reads, without an `obstacle`.
            steps_per_second: the fastest of an arm's iterations.
        """
        # At best the cache is full of weights from the step before.
        implied = (read_bytes - (self.cache_bytes or 0)) * steps_per_second
        most = TOLERANCE[self.kind]
        bandwidth = self.copy_bandwidth
        if implied <= most * bandwidth:
            return None
        # A copy can have been slow by accident, never fast.
        bandwidth = max(bandwidth, self.measure())
        if implied <= most * bandwidth:
            return None
        return (
            f"a rate above the physical limit: it reads at least {implied / 1e9:.3g} GB/s of weights, "
            f"and memory is copied at {bandwidth / 1e9:.3g} GB/s"
        )

    def _size(self) -> int:
        """Bytes of the copied tensor."""
        if self.kind == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            import psutil

            free = psutil.virtual_memory().available
        wanted = max(_LEAST[self.kind], CACHE_MULTIPLE * (self.cache_bytes or 0))
        return int(min(wanted, _SHARE * free))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB"
