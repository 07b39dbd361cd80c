"""A rate that memory cannot give, and when there is no such limit."""

from typing import Any

import pytest

from compress.bench import bandwidth, host
from compress.bench.bandwidth import Probe
from compress.bench.clock import WallClock

CACHE = 10_000_000
READ = 100_000_000
COPIED = 2e9


class Idle:
    """A session with nothing to wait for."""

    def synchronize(self) -> None:
        pass


def probe(monkeypatch: pytest.MonkeyPatch, cache: int | None = CACHE, *copies: float) -> Probe:
    """A probe of a machine whose copies are as fast as said, one measurement after the other."""
    left = iter(copies or (COPIED, COPIED))
    monkeypatch.setattr(host, "cache_bytes", lambda: cache)
    monkeypatch.setattr(Probe, "measure", lambda self: next(left))
    session: Any = Idle()
    return Probe("cpu", WallClock(), session)


def test_a_rate_that_memory_can_give(monkeypatch: pytest.MonkeyPatch) -> None:
    # 90 MB a step cannot have been in the cache, and twice the copy's bandwidth is let pass.
    possible = 2 * COPIED / (READ - CACHE)
    assert probe(monkeypatch).excess(READ, 0.99 * possible) is None
    reason = probe(monkeypatch).excess(READ, 1.01 * possible)
    assert reason is not None
    assert reason.startswith("a rate above the physical limit: it reads at least 4.04 GB/s")


def test_a_slow_copy_is_measured_again_before_a_rate_is_doubted(monkeypatch: pytest.MonkeyPatch) -> None:
    suspicious = 1.5 * 2 * COPIED / (READ - CACHE)
    assert probe(monkeypatch, CACHE, COPIED, 2 * COPIED).excess(READ, suspicious) is None
    assert probe(monkeypatch, CACHE, COPIED, 0.5 * COPIED).excess(READ, suspicious) is not None


def test_what_fits_the_cache_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe(monkeypatch).obstacle(READ) is None
    small = probe(monkeypatch).obstacle(30_000_000)
    assert small == "30 MB of weights are less than 4 times the cache of 10 MB, so memory is no limit"
    assert "not known" in str(probe(monkeypatch, None).obstacle(READ))


def test_a_machine_without_free_memory_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_SHARE", 1e-9)
    assert "too little memory" in str(probe(monkeypatch).obstacle(READ))


def test_a_copy_is_really_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_LEAST", {"cpu": 2**20})
    monkeypatch.setattr(host, "cache_bytes", lambda: None)
    session: Any = Idle()
    made = Probe("cpu", WallClock(), session)
    assert made.copy_bandwidth > 0
    assert made.measure() > 0
