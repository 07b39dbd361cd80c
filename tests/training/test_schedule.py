import math

import pytest

from compress.training.schedule import learning_rate


def rates(steps: int, warmup: float, floor: float) -> list[float]:
    return [learning_rate(step, steps, 2.0, warmup, floor) for step in range(steps)]


def test_it_rises_in_a_line_and_falls_along_half_a_cosine() -> None:
    found = rates(11, 0.2, 0.1)
    assert found[:3] == pytest.approx([2 / 3, 4 / 3, 2.0]), "three of eleven steps are a fifth, rounded up"
    assert found[3] == pytest.approx(2.0)
    assert found[-1] == pytest.approx(0.2)
    halfway = 0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * 4 / 7))
    assert found[7] == pytest.approx(halfway)
    assert sorted(found[3:], reverse=True) == found[3:]


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.9])
def test_short_trainings_learn_too(steps: int, warmup: float) -> None:
    found = rates(steps, warmup, 0.0)
    assert all(0 <= rate <= 2.0 for rate in found)
    assert max(found) == 2.0
