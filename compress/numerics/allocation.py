"""One option for each of several parts, with the least loss that a budget allows.

This is the multiple-choice knapsack problem (Sinha and Zoltners 1979, "The Multiple-Choice Knapsack Problem",
Operations Research 27). It is solved by dynamic programming over what the options cost beyond the cheapest
ones. Where these costs have a large common divisor, as those of a network of repeated layers have, the answer
is exact; else costs are rounded up to a fine grid, so that the budget holds in any case, and the loss is the
least of that grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

_LARGEST_GRID: Final = 1 << 17
"""Steps between the cheapest choice and the budget; memory is a byte for each step and part."""


@dataclass(frozen=True)
class Option:
    """One way to treat a part.

    Attributes:
        cost: what it takes of the budget; a whole number, not negative.
        loss: what it does to the model.
    """

    cost: int
    loss: float


class Infeasible(Exception):
    """Even the cheapest options cost more than the budget.

    Attributes:
        least: what they cost.
    """

    def __init__(self, least: int) -> None:
        super().__init__(f"the cheapest options cost {least}")
        self.least = least


def allocate(parts: Sequence[Sequence[Option]], budget: int) -> tuple[int, ...]:
    """The options with the least sum of losses among those whose costs sum up to the budget at most.

    Args:
        parts: for each part its options, at least one.
        budget: of all parts together.

    Returns:
        the index of the chosen option of each part. Of two with the same loss the cheaper one is taken.

    Raises:
        Infeasible: there is no such choice.
        ValueError: a part without options.
    """
    if any(not options for options in parts):
        raise ValueError("every part needs at least one option")
    if not parts:
        return ()
    least = sum(min(option.cost for option in options) for options in parts)
    if least > budget:
        raise Infeasible(least)
    extras = [[option.cost - min(o.cost for o in options) for option in options] for options in parts]
    steps, room = _on_grid(extras, budget - least)
    # loss[b]: the least loss of the parts so far that takes b steps at most.
    loss = np.zeros(room + 1)
    choices = np.zeros((len(parts), room + 1), dtype=np.int16)
    for part, options in enumerate(parts):
        best = np.full(room + 1, np.inf)
        # Cheap ones first and replaced only by what is better: that settles ties.
        for index in sorted(range(len(options)), key=lambda at: steps[part][at]):
            step = steps[part][index]
            if step > room:
                continue
            candidate = np.full(room + 1, np.inf)
            candidate[step:] = loss[: room + 1 - step] + options[index].loss
            better = candidate < best
            best[better] = candidate[better]
            choices[part][better] = index
        loss = best
    chosen = [0] * len(parts)
    at = int(np.argmin(loss))
    for part in reversed(range(len(parts))):
        chosen[part] = int(choices[part][at])
        at -= steps[part][chosen[part]]
    return tuple(chosen)


def _on_grid(extras: Sequence[Sequence[int]], slack: int) -> tuple[list[list[int]], int]:
    """Extra costs as steps of a grid, rounded up, and the steps that the slack has room for."""
    unit = math.gcd(*(cost for costs in extras for cost in costs)) or 1
    most = min(slack, sum(max(costs) for costs in extras))
    if most // unit > _LARGEST_GRID:
        unit = -(-most // _LARGEST_GRID)
    return [[-(-cost // unit) for cost in costs] for costs in extras], most // unit
