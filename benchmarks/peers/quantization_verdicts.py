"""The questions of the table of methods, answered from its arms by paired differences.

- *best*: our best method against the peer with the least divergence among all symmetric arms of theirs,
  at the same scheme. Theirs is chosen after the fact and ours before, which favours them. PASS when the
  interval lies below zero.
- *same method*: each of our arms against each peer's arm of the same method on the same kind of grid.
  PASS when the upper bound is at most the margin.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from arms import MARGIN, compare_arms
from grid import OURS

CONFIDENCE = 0.975
"""Of each bound, so that the interval between them holds 95%."""
BEST = "best"
LOW_WIDTHS = (3, 2)

Arm = Mapping[str, Any]


def verdicts_of(arms: Sequence[Arm], document: list[int]) -> list[dict[str, Any]]:
    """All comparisons, scheme by scheme."""
    found = []
    for scheme in dict.fromkeys((arm["bits"], arm["group_size"]) for arm in arms):
        held = [arm for arm in arms if (arm["bits"], arm["group_size"]) == scheme]
        ours = [arm for arm in held if arm["program"] == OURS]
        theirs = [arm for arm in held if arm["program"] != OURS]
        pairs = [("best", *pair) for pair in best_pairs(ours, theirs)]
        pairs += [("same method", *pair) for pair in method_pairs(ours, theirs)]
        found += [entry for pair in pairs if (entry := _compared(*pair, document)) is not None]
    return found


def best_pairs(ours: Sequence[Arm], theirs: Sequence[Arm]) -> list[tuple[Arm, Arm]]:
    """Our best arm with the best of the peers', where both are there."""
    rivals = [arm for arm in theirs if arm["symmetric"]]
    if not rivals:
        return []
    rival = min(rivals, key=lambda arm: float(arm["divergence"]))
    return [(arm, rival) for arm in ours if arm["method"] == BEST]


def method_pairs(ours: Sequence[Arm], theirs: Sequence[Arm]) -> list[tuple[Arm, Arm]]:
    """Arms of one method on one kind of grid."""
    return [
        (mine, other)
        for mine in ours
        for other in theirs
        if (mine["method"], mine["symmetric"]) == (other["method"], other["symmetric"])
    ]


def _compared(question: str, ours: Arm, theirs: Arm, document: list[int]) -> dict[str, Any] | None:
    compared = compare_arms(ours, theirs, document, CONFIDENCE)
    if compared is None:
        return None
    seeds, difference = compared
    # At 4 bits nothing asks our best to be better, only not to be worse.
    beat = question == BEST and ours["bits"] in LOW_WIDTHS
    return {
        "question": question,
        "bits": ours["bits"],
        "group_size": ours["group_size"],
        "method": ours["method"],
        "ours": ours["preset"],
        "theirs": f"{theirs['program']} {theirs['preset']}",
        "seeds": seeds,
        **asdict(difference),
        "low": difference.low,
        "high": difference.high,
        "asked": "below zero" if beat else f"at most {100 * MARGIN:.1f}%",
        "verdict": difference.better() if beat else difference.verdict(MARGIN),
    }
