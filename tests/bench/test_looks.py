"""How many rounds a further look takes."""

import pytest

from compress.bench.looks import error_share, further_rounds


@pytest.mark.parametrize(
    ("rounds", "seconds", "left", "expected"),
    [
        (3, 10.0, 1_000.0, 3),
        (6, 10.0, 60.0, 6),
        (6, 10.0, 59.0, 5),
        (6, 10.0, 20.0, 2),
        (6, 10.0, 19.0, 0),
        (3, 10.0, 0.0, 0),
        (3, 10.0, -5.0, 0),
        (3, 0.0, 1.0, 3),
    ],
)
def test_as_many_as_there_were_or_what_there_is_room_for(
    rounds: int, seconds: float, left: float, expected: int
) -> None:
    assert further_rounds(rounds, seconds, left) == expected


@pytest.mark.parametrize("looks", [1, 2, 4, 7])
def test_whichever_look_is_the_last_the_looks_spend_the_whole_error(looks: int) -> None:
    for last in range(1, looks + 1):
        spent = [error_share(look, looks, last=look == last) for look in range(1, last + 1)]
        assert sum(spent) == pytest.approx(1.0)


def test_a_look_that_is_not_the_last_spends_an_equal_share() -> None:
    assert [error_share(look, 4, last=False) for look in (1, 2, 3)] == [0.25] * 3
    assert [error_share(look, 4, last=True) for look in (1, 2, 3, 4)] == [1.0, 0.75, 0.5, 0.25]
