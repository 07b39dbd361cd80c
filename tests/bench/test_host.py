"""The system's counters, from files as a kernel writes them."""

from pathlib import Path

import pytest

from compress.bench import host

STAT = """\
cpu  1 2 3 4 5 6 7 8 0 0
cpu0 100 1 10 1000 5 0 2 30 0 0
cpu1 200 0 20 2000 5 1 1 10 0 0
cpu2 9 9 9 9 9 9 9 9 0 0
intr 5
"""


@pytest.fixture(autouse=True)
def _two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_cores", lambda: (0, 1))


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_a_system_that_counts_nothing(tmp_path: Path) -> None:
    found = host.read(tmp_path)
    assert (found.throttled, found.thermal, found.stolen, found.busy) == (None, None, None, None)
    assert host.cache_bytes(tmp_path) is None


def test_stolen_time_of_the_processors_that_we_may_use(tmp_path: Path) -> None:
    write(tmp_path, "proc/stat", STAT)
    found = host.read(tmp_path)
    assert found.stolen == 30 + 10
    assert found.busy == (100 + 1 + 10 + 2 + 30) + (200 + 20 + 1 + 1 + 10)


def test_a_quota_of_our_cgroup_and_of_those_above_it(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/pod/box\n")
    write(tmp_path, "sys/fs/cgroup/cgroup.controllers", "cpu memory")
    write(tmp_path, "sys/fs/cgroup/cpu.stat", "usage_usec 5\n")
    assert host.read(tmp_path).throttled is None
    write(tmp_path, "sys/fs/cgroup/pod/cpu.stat", "nr_throttled 1\nthrottled_usec 1500000\n")
    write(tmp_path, "sys/fs/cgroup/pod/box/cpu.stat", "throttled_usec 500000\n")
    assert host.read(tmp_path).throttled == pytest.approx(2.0)


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_a_quota_of_the_first_version_of_cgroups(tmp_path: Path, mount: str) -> None:
    write(tmp_path, "proc/self/cgroup", "5:memory:/x\n4:cpu,cpuacct:/hidden\n0::/\n")
    # A container whose own group is the top of what it sees.
    write(tmp_path, f"sys/fs/cgroup/{mount}/cpu.stat", "nr_periods 9\nthrottled_time 2500000000\n")
    assert host.read(tmp_path).throttled == pytest.approx(2.5)


def test_processors_are_as_many_as_a_quota_allows(tmp_path: Path) -> None:
    assert host.processors(tmp_path) == 2
    write(tmp_path, "proc/self/cgroup", "0::/box\n")
    write(tmp_path, "sys/fs/cgroup/cgroup.controllers", "cpu memory")
    write(tmp_path, "sys/fs/cgroup/box/cpu.max", "max 100000\n")
    assert host.processors(tmp_path) == 2
    write(tmp_path, "sys/fs/cgroup/box/cpu.max", "150000 100000\n")
    assert host.processors(tmp_path) == 1
    write(tmp_path, "sys/fs/cgroup/box/cpu.max", "50000 100000\n")
    assert host.processors(tmp_path) == 1


@pytest.mark.parametrize(("quota", "count"), [(-1, 2), (150_000, 1)])
def test_a_quota_of_the_first_version(tmp_path: Path, quota: int, count: int) -> None:
    write(tmp_path, "proc/self/cgroup", "4:cpu,cpuacct:/\n")
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", f"{quota}\n")
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert host.processors(tmp_path) == count


def test_hot_processors_and_packages(tmp_path: Path) -> None:
    for core, count in ((0, 3), (1, 4), (2, 100)):
        write(
            tmp_path, f"sys/devices/system/cpu/cpu{core}/thermal_throttle/core_throttle_count", f"{count}\n"
        )
    write(tmp_path, "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count", "2\n")
    assert host.read(tmp_path).thermal == 3 + 4 + 2


def cache(
    root: Path, core: int, index: int, level: int, size: str, shared: str, kind: str = "Unified"
) -> None:
    folder = f"sys/devices/system/cpu/cpu{core}/cache/index{index}"
    for name, text in (("level", str(level)), ("size", size), ("shared_cpu_list", shared), ("type", kind)):
        write(root, f"{folder}/{name}", f"{text}\n")


def test_the_last_level_of_cache_counts_once_where_it_is_shared(tmp_path: Path) -> None:
    for core in (0, 1):
        cache(tmp_path, core, 0, 1, "32K", str(core), "Instruction")
        cache(tmp_path, core, 1, 2, "1M", str(core))
        cache(tmp_path, core, 2, 3, "32768K", "0-7")
    assert host.cache_bytes(tmp_path) == 32 * 2**20
    cache(tmp_path, 1, 2, 3, "32M", "8-15")
    assert host.cache_bytes(tmp_path) == 64 * 2**20


def test_free_memory_is_what_the_system_and_every_cgroup_leave(tmp_path: Path) -> None:
    everything = host.free_bytes(tmp_path)
    assert everything > 0
    group = tmp_path / "sys/fs/cgroup"
    (group / "inner").mkdir(parents=True)
    (group / "cgroup.controllers").write_text("cpu memory\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/inner\n")
    (group / "inner/memory.max").write_text("max\n")
    (group / "inner/memory.current").write_text("5\n")
    assert host.free_bytes(tmp_path) > 5
    (group / "memory.max").write_text("1000\n")
    (group / "memory.current").write_text("400\n")
    assert host.free_bytes(tmp_path) == 600
    (group / "memory.current").write_text("1200\n")
    assert host.free_bytes(tmp_path) == 0
