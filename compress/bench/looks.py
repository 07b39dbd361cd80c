"""Looks at gates: how much a further one measures, and how often each may err."""

from typing import Final

_FEWEST: Final = 3
"""A look that adds less than one part in so many of the rounds that there were would hardly move a bound."""


def further_rounds(rounds: int, seconds: float, left: float) -> int:
    """Rounds of launches that the next look takes: as many as there were, or what the budget leaves room for.

    Args:
        rounds: that there were so far.
        seconds: that one of them takes.
        left: of the budget.

    Returns:
        0 where there is no room for a look that is worth it.
    """
    if left <= 0:
        return 0
    affordable = rounds if seconds <= 0 else min(rounds, int(left / seconds))
    return affordable if _FEWEST * affordable >= rounds else 0


def error_share(look: int, looks: int, *, last: bool) -> float:
    """Share of a gate's error that a look may spend (docs/decisions/0023).

    An equal one for each, and the last look has all that those before it did not spend and those after it
    will not. Over an experiment they add up to 1 at most, so whichever look decides, the verdict errs at most
    as often as the gate says (Bonferroni).

    Args:
        look: its number, from 1.
        looks: that there may be.
        last: whether no further one follows. It must be known from elsewhere than the samples, such as the
            clock: a look must not be the last because of what was seen in it.
    """
    return (looks - look + 1) / looks if last else 1 / looks
