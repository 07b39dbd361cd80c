"""The choice of options under a budget, held against trying everything."""

import itertools
import random

import pytest

from compress.numerics.allocation import Infeasible, Option, allocate


def best_of_all(parts: list[list[Option]], budget: int) -> float:
    sums = (
        (sum(option.cost for option in choice), sum(option.loss for option in choice))
        for choice in itertools.product(*parts)
    )
    return min(loss for cost, loss in sums if cost <= budget)


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_best_of_all(seed: int) -> None:
    draw = random.Random(seed)
    parts = [
        [Option(draw.randint(0, 40) * 64, draw.random()) for _ in range(draw.randint(1, 4))] for _ in range(6)
    ]
    least = sum(min(option.cost for option in options) for options in parts)
    budget = least + draw.randint(0, 6_000)
    chosen = allocate(parts, budget)
    picked = [options[index] for options, index in zip(parts, chosen, strict=True)]
    assert sum(option.cost for option in picked) <= budget
    assert sum(option.loss for option in picked) == pytest.approx(best_of_all(parts, budget), abs=1e-12)


def test_costs_without_a_common_divisor_keep_to_the_budget_and_come_close() -> None:
    draw = random.Random(0)
    parts = [[Option(draw.randint(10**8, 10**9), draw.random()) for _ in range(3)] for _ in range(8)]
    budget = sum(sorted(option.cost for option in options)[1] for options in parts)
    chosen = allocate(parts, budget)
    picked = [options[index] for options, index in zip(parts, chosen, strict=True)]
    assert sum(option.cost for option in picked) <= budget
    # What was rounded up is less than one part in ten thousand.
    assert sum(option.loss for option in picked) <= best_of_all(parts, budget * 9_999 // 10_000) + 1e-12


def test_a_cheaper_option_wins_a_tie_and_nothing_is_spent_for_nothing() -> None:
    parts = [[Option(8, 1.0), Option(2, 1.0), Option(4, 0.5)]]
    assert allocate(parts, 3) == (1,)
    assert allocate(parts, 100) == (2,)
    assert allocate([], 0) == ()


def test_what_cannot_be() -> None:
    with pytest.raises(Infeasible) as refused:
        allocate([[Option(3, 0.0)], [Option(4, 0.0), Option(9, 1.0)]], 6)
    assert refused.value.least == 7
    with pytest.raises(ValueError, match="at least one option"):
        allocate([[]], 6)
