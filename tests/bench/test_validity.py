"""What goes on around a launch, and when it is not to be trusted."""

from collections.abc import Iterable
from typing import Any

import pytest

from compress.bench.host import Counters
from compress.bench.nvml import Gpu, Tenants, open_gpu
from compress.bench.validity import Watch, Watched
from tests.fake_nvml import UUID, FakeNvml

START = Counters(seconds=100.0, throttled=5.0, thermal=7, stolen=50, busy=1000)


def watched(end: Counters, *, start: Counters = START, steal_limit: float | None = None) -> Watched:
    readings = iter([start, end])
    return Watch(steal_limit, read=lambda: next(readings)).finish()


def test_a_quiet_launch() -> None:
    found = watched(Counters(110.0, 5.0, 7, 90, 2000))
    assert found.distrust == ()
    assert found.conditions == {"throttled_seconds": 0.0, "thermal_throttles": 0, "steal_share": 0.04}


def test_what_is_not_counted_is_said_and_trusted() -> None:
    nothing = Counters(100.0, None, None, None, None)
    found = watched(Counters(110.0, None, None, None, None), start=nothing)
    assert found.distrust == ()
    assert set(found.conditions.values()) == {"not counted here"}


def test_a_quota_that_held_it_back() -> None:
    assert watched(Counters(110.0, 5.05, 7, 50, 2000)).distrust == ()
    (reason,) = watched(Counters(110.0, 6.0, 7, 50, 2000)).distrust
    assert reason.startswith("throttled: a quota on processors held it back for 1 of 10 s")


def test_heat() -> None:
    (reason,) = watched(Counters(110.0, 5.0, 9, 50, 2000)).distrust
    assert reason == "throttled clock: processors slowed down 2 times because of heat"


def test_stolen_processors_are_noted_and_limited_only_where_asked() -> None:
    end = Counters(110.0, 5.0, 7, 350, 2000)
    assert watched(end).conditions["steal_share"] == pytest.approx(0.3)
    assert watched(end).distrust == ()
    assert watched(end, steal_limit=0.4).distrust == ()
    (reason,) = watched(end, steal_limit=0.2).distrust
    assert reason == "the host stole 30.0% of the processors, more than 20.0%"


def on_gpu(library: FakeNvml, during: Iterable[dict[str, Any]], seconds: float = 10.0) -> Watched:
    """A launch on a GPU whose state changes between the looks."""
    gpu = open_gpu(UUID, library)
    assert isinstance(gpu, Gpu)
    tenants = Tenants(gpu, 1, 0, parent_holds=False)
    readings = iter([START, Counters(START.seconds + seconds, 5.0, 7, 50, 1100)])
    watch = Watch(None, gpu, tenants, read=lambda: next(readings))
    for state in during:
        vars(library).update(state)
        watch.look()
    return watch.finish()


ALONE = {"processes": {1: 10}}


def test_a_quiet_gpu_at_its_power_limit_is_trusted() -> None:
    found = on_gpu(FakeNvml(), [{**ALONE, "reasons": 0x4}, {"reasons": 0x1}])
    assert found.distrust == ()
    assert found.conditions["gpu"] == {"slowdowns": [], "power_cap": True, "foreign_processes": []}


def test_a_slowdown_seen_at_any_look() -> None:
    found = on_gpu(FakeNvml(), [{**ALONE, "reasons": 0x8}, {"reasons": 0x1}])
    assert found.distrust == ("throttled clock: hardware slowdown of the GPU",)
    library = FakeNvml()
    library.reasons = 0x80
    # It was over when the launch began to work.
    assert on_gpu(library, [{**ALONE, "reasons": 0}]).distrust == ()


def test_a_slowdown_between_the_looks_is_in_the_driver_s_counters() -> None:
    started = {"slowed": {269: 10**9, 270: 10**9, 271: 0}}
    library = FakeNvml()
    vars(library).update(started)
    brief = {"slowed": {269: 10**9 + 5 * 10**7, 270: 10**9, 271: 0}}
    assert on_gpu(library, [ALONE, brief]).distrust == ()
    vars(library).update(started, processes={})
    longer = {"slowed": {269: 10**9, 270: 2 * 10**9, 271: 0}}
    found = on_gpu(library, [ALONE, longer])
    assert found.distrust == ("throttled clock: thermal slowdown by the hardware of the GPU",)


def test_a_neighbour_on_the_gpu() -> None:
    found = on_gpu(FakeNvml(), [ALONE, {"processes": {1: 10, 4711: 5}}, ALONE])
    assert found.distrust == ("a foreign process on the GPU: 4711",)
    assert found.conditions["gpu"]["foreign_processes"] == [4711]


def test_a_gpu_that_cannot_be_asked_says_why() -> None:
    readings = iter([START, START])
    reason = "nvidia-ml-py is not installed"
    found = Watch(None, reason, reason, read=lambda: next(readings)).finish()
    assert found.distrust == ()
    assert set(found.conditions["gpu"].values()) == {reason}
    library = FakeNvml()
    library.refuses |= {"reasons", "processes"}
    refused = on_gpu(library, [{}])
    assert refused.distrust == ()
    assert all("Not Supported" in said for said in refused.conditions["gpu"].values())
