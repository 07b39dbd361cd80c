"""Limits as people write them."""

import pytest

from compress.core.budget import Budget, SizeBudget, bytes_of


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GB", 2_000_000_000), ("600MiB", 600 * 2**20), ("1.5 KiB", 1536), ("12B", 12), ("3TB", 3 * 10**12)],
)
def test_a_size_is_a_number_with_a_unit(text: str, count: int) -> None:
    assert bytes_of(text) == count


@pytest.mark.parametrize("text", ["2", "GB", "2 gigs", "-1GB", "2gb", "1e9B", ""])
def test_anything_else_is_refused_with_what_came(text: str) -> None:
    with pytest.raises(ValueError, match=f"such as 2GB.*got '{text}'"):
        bytes_of(text)


def test_a_limit_says_its_unit() -> None:
    assert str(Budget("bytes", 2e9)) == "2,000,000,000 bytes"
    assert str(Budget("bits", 4.5)) == "4.5 bits a weight"
    assert str(Budget("divergence", 0.02)) == "0.02 nats a position"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50%", SizeBudget("share", 0.5)),
        ("12.5%", SizeBudget("share", 0.125)),
        ("1_500_000", SizeBudget("parameters", 1_500_000)),
        ("500MB", SizeBudget("bytes", 500_000_000)),
        ("2 GiB", SizeBudget("bytes", 2 * 2**30)),
        ("1.5x", SizeBudget("speed", 1.5)),
    ],
)
def test_a_budget_of_size_is_told_by_its_unit(text: str, expected: SizeBudget) -> None:
    assert SizeBudget.parse(text) == expected


@pytest.mark.parametrize("text", ["0%", "100%", "1x", "0.5x", "half", "-3", "x", "%"])
def test_what_is_no_budget_of_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"share|speed|size"):
        SizeBudget.parse(text)
