"""What the system counts that slows a process down without its doing, and how large its caches are.

Each counter only grows; two readings around a launch tell what happened in between. What a system does not
count is ``None``: on another kernel, in a container without ``/sys``, on a virtual machine that does not
see its host's temperature.
"""

import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/")
_THROTTLED: Final = {"throttled_usec": 1e-6, "throttled_time": 1e-9}
"""The counter in ``cpu.stat`` and its unit in seconds: of the second version of cgroups, and of the first."""
_SIZES: Final = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Counters:
    """One reading.

    Attributes:
        seconds: of a clock that only goes forward.
        throttled: seconds for which the processors' quota of our cgroup, or of one above it, held its
            processes back; summed over processors.
        thermal: how often our processors, or their packages, slowed down because they were hot.
        stolen: ticks in which the host ran somebody else while one of our processors had work.
        busy: ticks in which our processors had work, stolen ones included.
    """

    seconds: float
    throttled: float | None
    thermal: int | None
    stolen: int | None
    busy: int | None


def read(root: Path = _ROOT) -> Counters:
    """All counters now.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    cores = _cores()
    stolen, busy = _ticks(root, cores)
    return Counters(time.perf_counter(), _throttled(root), _thermal(root, cores), stolen, busy)


def processors(root: Path = _ROOT) -> int:
    """How many processors this process may keep busy: those it may use, or fewer by a quota.

    More threads than a quota allows are all stopped together for a part of each period.
    """
    allowed = float(len(_cores()))
    for folder in _groups(root):
        # In the second version of cgroups one file, where "max" is none; in the first -1 is none.
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = (_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit():
            allowed = min(allowed, int(quota) / int(period))
    return max(int(allowed), 1)


def cache_bytes(root: Path = _ROOT) -> int | None:
    """Bytes of the last level of cache, over all of the caches that our processors have at this level."""
    sizes: dict[tuple[int, str], int] = {}
    for core in _cores():
        for folder in sorted((root / f"sys/devices/system/cpu/cpu{core}/cache").glob("index[0-9]*")):
            level, size, shared = (_text(folder / name) for name in ("level", "size", "shared_cpu_list"))
            found = re.fullmatch(r"(\d+)([KMG]?)", size)
            if found and level.isdigit() and _text(folder / "type") != "Instruction":
                sizes[int(level), shared] = int(found[1]) * _SIZES.get(found[2], 1)
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last) or None


def free_bytes(root: Path = _ROOT) -> int:
    """Bytes of memory that processes of this cgroup may still take before something has to give way."""
    import psutil

    found = [psutil.virtual_memory().available]
    for folder in _groups(root):
        # Files of the second version of cgroups; where there is no limit the first says "max".
        most, used = (_text(folder / f"memory.{name}") for name in ("max", "current"))
        if most.isdigit() and used.isdigit():
            found.append(int(most) - int(used))
    return max(min(found), 0)


def _cores() -> tuple[int, ...]:
    """Processors that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return tuple(sorted(allowed(0))) if allowed is not None else tuple(range(os.cpu_count() or 1))


def _text(file: Path) -> str:
    """What a file of the system says; nothing where there is none."""
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _throttled(root: Path) -> float | None:
    """Seconds in all cgroups from ours up: a quota of any of them holds us too."""
    found = []
    for folder in _groups(root):
        for name, unit in _THROTTLED.items():
            match = re.search(rf"^{name} (\d+)$", _text(folder / "cpu.stat"), flags=re.MULTILINE)
            if match:
                found.append(unit * int(match[1]))
    return sum(found) if found else None


def _groups(root: Path) -> list[Path]:
    """Folders of our cgroup that accounts for processors, and of those above it."""
    mounted = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(","):
            top = mounted / "cpu" if (mounted / "cpu").is_dir() else mounted / controllers
        elif number == "0" and (mounted / "cgroup.controllers").is_file():
            top = mounted
        else:
            continue
        # A container may see its own cgroup as the top, under a path that only its host knows.
        own = [top / part for part in (Path(path.lstrip("/")), *Path(path.lstrip("/")).parents)]
        return list(dict.fromkeys(folder for folder in own if folder.is_dir()))
    return []


def _thermal(root: Path, cores: Iterable[int]) -> int | None:
    counts = [
        _text(root / f"sys/devices/system/cpu/cpu{core}/thermal_throttle" / name)
        for core in cores
        for name in ("core_throttle_count", "package_throttle_count")
    ]
    known = [int(count) for count in counts if count.isdigit()]
    return sum(known) if known else None


def _ticks(root: Path, cores: Iterable[int]) -> tuple[int | None, int | None]:
    """Stolen ticks and ticks with work, of our processors; columns as in proc_stat(5)."""
    ours = {f"cpu{core}" for core in cores}
    rows = [line.split() for line in _text(root / "proc/stat").splitlines()]
    counts = [[int(count) for count in row[1:9]] for row in rows if row and row[0] in ours and len(row) > 8]
    if not counts:
        return None, None
    # user, nice, system, idle, iowait, irq, softirq, steal
    return sum(row[7] for row in counts), sum(sum(row) - row[3] - row[4] for row in counts)
