"""Which blocks go, from what was measured of each of them or of each run of neighbours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
    """The blocks that do least, as far as a configuration can do without them.

    Where the model without exactly these cannot be said, they are taken one by one, each the least of those
    without which it can; where that does not lead there either, they go as neighbours.

    Returns:
        numbers, rising.

    Raises:
        PlanError: there is no configuration for any selection.
    """
    order = ranked(measured)
    first = tuple(sorted(order[: plan.gone]))
    if plan.fits(first):
        return first
    found = one_by_one(plan, order)
    if found is not None:
        return found
    sums = {start: sum(measured[number] for number in window(plan, start)) for start in starts(plan)}
    return best_window(sums, plan)


def best_window(measured: Mapping[int, float], plan: DepthPlan) -> tuple[int, ...]:
    """The neighbours that do least together, as far as a configuration can do without them.

    Args:
        measured: by the number of the first of them.

    Raises:
        PlanError: there is no configuration without any of the windows.
    """
    for start in ranked(measured):
        if plan.fits(window(plan, start)):
            return window(plan, start)
    raise no_selection(plan)


def starts(plan: DepthPlan) -> Sequence[int]:
    """The first blocks of all windows that may go."""
    return range(plan.stay + 1)


def window(plan: DepthPlan, start: int) -> tuple[int, ...]:
    """As many neighbours as go, from one block on."""
    return tuple(range(start, start + plan.gone))


def no_selection(plan: DepthPlan) -> PlanError:
    """The error where no selection of blocks can be said in a configuration."""
    return PlanError(
        f"no {plan.gone} of the {len(plan.blocks)} blocks can be taken out: {plan.refusal}",
        "ask for another number with --layers",
    )
