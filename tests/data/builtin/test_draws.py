"""Draws are the same everywhere, because only the promised function of `random` is asked."""

import random

import pytest

from compress.data.builtin.draws import Draws


def test_the_numbers_of_a_name_are_pinned() -> None:
    draws = Draws("golden")
    assert [draws.below(1000) for _ in range(6)] == [330, 247, 830, 375, 791, 516]
    assert draws.mixed("abcdef") == list("cfbdea")
    assert [draws.between(-1, 1) for _ in range(5)] == [0, 0, 1, 1, 1]
    assert [draws.weighted((1, 2, 3)) for _ in range(6)] == [1, 0, 1, 1, 1, 2]


def test_only_the_promised_function_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("choice", "choices", "shuffle", "sample", "randrange", "randint", "getrandbits", "uniform"):
        monkeypatch.setattr(random.Random, name, lambda *_, **__: pytest.fail("not promised"))
    draws = Draws("any")
    assert draws.one("x") == "x"
    draws.some(range(9), 4)
    draws.holds(0.5)
    draws.weighted((1.0, 2.0))


def test_some_items_are_different_ones() -> None:
    draws = Draws("some")
    counts = [0] * 5
    for _ in range(2000):
        found = draws.some(range(5), 3)
        assert len(set(found)) == 3
        counts[found[0]] += 1
    # Each is first 400 times but for five standard deviations.
    assert all(abs(count - 400) < 5 * (2000 * 0.2 * 0.8) ** 0.5 for count in counts)
    with pytest.raises(ValueError, match="6 of 5 items"):
        draws.some(range(5), 6)


def test_weights_are_shares() -> None:
    draws = Draws("weights")
    counts = [0, 0, 0]
    for _ in range(4000):
        counts[draws.weighted((1, 0, 3))] += 1
    assert counts[1] == 0
    assert abs(counts[0] - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5
