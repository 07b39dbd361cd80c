"""Which blocks go, from what was measured of each of them or of each run of neighbours."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product

from compress.core.errors import PlanError
from compress.sweep.depth_plan import DepthPlan, one_by_one


@dataclass(frozen=True)
class Judgement:
    """Which blocks go, and why.

    Attributes:
        gone: their numbers, rising.
        measure: what was measured of blocks: ``influence`` or ``loss``.
        blocks: the measure by number of block; smaller is more dispensable.
        windows: the measure of neighbours that go together, by the number of the first.
        tokens: how many it was measured on.
    """

    gone: tuple[int, ...]
    measure: str
    blocks: Mapping[int, float]
    windows: Mapping[int, float] = field(default_factory=dict)
    tokens: int = 0


def ranked(measured: Mapping[int, float]) -> list[int]:
    """Blocks in the order in which they should go; of equal ones the later first, which less is built on."""
    return sorted(measured, key=lambda number: (measured[number], -number))


def dispensable(measured: Mapping[int, float], plan: DepthPlan) -> tuple[int, ...]:
    """The blocks of every stack that do least, as far as a configuration can do without them.

    Where the model without exactly these cannot be said, they are taken one by one, each the least of those
    without which it can; where that does not lead there either, they go as neighbours.

    Returns:
        numbers, rising.

    Raises:
        PlanError: there is no configuration for any selection.
    """
    order = ranked(measured)
    least = ([number for number in order if number in stack.numbers] for stack in plan.stacks)
    first = tuple(
        sorted(n for numbers, stack in zip(least, plan.stacks, strict=True) for n in numbers[: stack.gone])
    )
    if plan.fits(first):
        return first
    found = one_by_one(plan, order)
    if found is not None:
        return found
    sums = {w[0]: sum(measured[number] for number in w) for w in windows(plan)}
    return best_windows(sums, plan)


def best_windows(measured: Mapping[int, float], plan: DepthPlan) -> tuple[int, ...]:
    """The neighbours of every stack that do least together, as far as a configuration can do without them.

    Args:
        measured: by the number of the first of them.

    Returns:
        numbers, rising.

    Raises:
        PlanError: there is no configuration without any of the windows.
    """
    losing = [stack for stack in plan.stacks if stack.gone]
    starts = [ranked({start: measured[start] for start in stack.starts}) for stack in losing]
    for chosen in product(*starts):
        gone = [number for stack, start in zip(losing, chosen, strict=True) for number in stack.window(start)]
        if plan.fits(gone):
            return tuple(gone)
    raise no_selection(plan)


def windows(plan: DepthPlan) -> list[tuple[int, ...]]:
    """All runs of neighbours that may go, each of one stack, in the order of their first blocks."""
    return [stack.window(start) for stack in plan.stacks for start in stack.starts]


def no_selection(plan: DepthPlan) -> PlanError:
    """The error where no selection of blocks can be said in a configuration."""
    return PlanError(
        f"no {plan.gone} of the {len(plan.blocks)} blocks can be taken out: {plan.refusal}",
        "ask for another number with --layers",
    )
