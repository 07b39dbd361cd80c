"""How many rounds a further look takes."""

import pytest

from compress.bench.looks import further_rounds


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
