"""Whether a timed launch can be trusted: what went on around it on the same machine.

Two readings around a launch, and a look at the GPU after each metric, tell what slowed it down from
outside. A launch is not to be trusted where

- a quota on processors held it back, or processors slowed down because they were hot;
- the GPU's clocks were held back by heat, by a power brake or by another slowdown of the hardware;
- somebody else computed on the same GPU;
- the host stole more of the processors than the option ``steal_limit`` allows.

Its power cap is no such reason: under load many GPUs are at it all the time, with every model, and it is
noted. Nor are stolen processors by default: on shared machines there always are some, and arms that take
turns bear them alike; the share is noted. What one metric finds wrong with itself (a clock that disagrees,
an output cut short, a rate above what memory can do) is marked there, in `compress.bench.metrics`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

from compress.bench import host
from compress.bench.nvml import Gpu, Tenants

THROTTLED_SHARE: Final = 0.01
"""Of a launch's time: a quota or a slowdown that holds for less than this is let pass."""


@dataclass(frozen=True)
class Watched:
    """What was seen around one launch.

    Attributes:
        conditions: for the record; what could not be watched says why in its place.
        distrust: why the launch cannot be trusted; empty where all was well.
    """

    conditions: Mapping[str, Any] = field(default_factory=dict)
    distrust: tuple[str, ...] = ()


@final
class Watch:
    """Watches from when it is made until `finish`.

    Args:
        steal_limit: largest share of the wanted processor time that the host may steal, or none.
        gpu: that the launch runs on; or why it cannot be asked; or none where it runs on no GPU.
        tenants: who is on it, or why that is not known.
        read: takes a reading of the host; for tests.
    """

    def __init__(
        self,
        steal_limit: float | None,
        gpu: Gpu | str | None = None,
        tenants: Tenants | str = "not watched",
        read: Callable[[], host.Counters] = host.read,
    ) -> None:
        self._steal_limit = steal_limit
        self._gpu = gpu
        self._tenants = tenants
        self._read = read
        self._held: dict[str, None] = {}
        self._power_cap = False
        self._unknown: str | None = gpu if isinstance(gpu, str) else None
        self._slowed = self._looked()
        # The GPU was idle until now; only what holds while it works counts.
        self._held.clear()
        self._power_cap = False
        self._start = read()

    def look(self) -> None:
        """See what holds the GPU back at this moment, and who is on it. Call it right after some work."""
        self._looked()

    def finish(self) -> Watched:
        """What was seen since the beginning."""
        slowed = self._looked()
        end = self._read()
        seconds = max(end.seconds - self._start.seconds, 1e-9)
        conditions, distrust = self._host(end, seconds)
        if self._gpu is not None:
            for words, nanoseconds in slowed.items():
                share = (nanoseconds - self._slowed.get(words, 0)) / 1e9 / seconds
                if share > THROTTLED_SHARE:
                    self._held[words] = None
            gpu, more = self._device()
            conditions["gpu"] = gpu
            distrust += more
        return Watched(conditions, tuple(distrust))

    def _looked(self) -> dict[str, int]:
        """Look once; the nanoseconds for which each reason has held the clocks back so far."""
        if isinstance(self._tenants, Tenants):
            self._tenants.look()
        if not isinstance(self._gpu, Gpu):
            return {}
        clocks = self._gpu.clocks()
        if isinstance(clocks, str):
            self._unknown = clocks
            return {}
        self._held.update(dict.fromkeys(clocks.slowdowns))
        self._power_cap |= clocks.power_cap
        return clocks.slowed

    def _host(self, end: host.Counters, seconds: float) -> tuple[dict[str, Any], list[str]]:
        """Conditions and reasons for distrust of the host."""
        conditions: dict[str, Any] = {}
        distrust = []
        throttled = _grown(self._start.throttled, end.throttled)
        conditions["throttled_seconds"] = "not counted here" if throttled is None else throttled
        if throttled is not None and throttled > THROTTLED_SHARE * seconds:
            distrust.append(
                f"throttled: a quota on processors held it back for {throttled:.3g} of {seconds:.3g} s; "
                "fewer threads may fit it"
            )
        thermal = _grown(self._start.thermal, end.thermal)
        conditions["thermal_throttles"] = "not counted here" if thermal is None else int(thermal)
        if thermal:
            distrust.append(f"throttled clock: processors slowed down {int(thermal)} times because of heat")
        stolen, busy = _grown(self._start.stolen, end.stolen), _grown(self._start.busy, end.busy)
        share = None if stolen is None or busy is None else stolen / max(busy, 1)
        conditions["steal_share"] = "not counted here" if share is None else round(share, 4)
        if share is not None and self._steal_limit is not None and share > self._steal_limit:
            distrust.append(
                f"the host stole {share:.1%} of the processors, more than {self._steal_limit:.1%}"
            )
        return conditions, distrust

    def _device(self) -> tuple[dict[str, Any], list[str]]:
        """Conditions and reasons for distrust of the GPU."""
        distrust = [f"throttled clock: {words} of the GPU" for words in self._held]
        conditions: dict[str, Any] = {
            "slowdowns": self._unknown or list(self._held),
            "power_cap": self._unknown or self._power_cap,
        }
        if isinstance(self._tenants, str):
            conditions["foreign_processes"] = self._tenants
            return conditions, distrust
        foreign = sorted(self._tenants.foreign)
        conditions["foreign_processes"] = foreign or self._tenants.unknown or []
        if foreign:
            numbers = ", ".join(map(str, foreign))
            distrust.append(f"a foreign process on the GPU: {numbers}")
        return conditions, distrust


def _grown(before: float | None, after: float | None) -> float | None:
    """By how much a counter grew; nothing where it is not counted."""
    return None if before is None or after is None else after - before
