"""How much a further look at undecided gates measures."""

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
