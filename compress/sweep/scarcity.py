"""Which matrices saw too little calibration text to be treated well: mostly experts that are rarely asked.

The statistic of an input is a sum over tokens. Over fewer tokens than the input has columns it leaves whole
directions unseen, and a method then takes them for ones that do not matter. Such a matrix is treated all the
same, because it may be of little weight where it is so rarely asked, and it is named.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def scarce(layers: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Matrices with fewer calibration tokens than inputs, the one with the fewest first.

    Args:
        layers: rows of the table of layers; those without ``tokens`` have no input to calibrate on.

    Returns:
        name to tokens; empty where nothing was calibrated.
    """
    found = {
        str(row["layer"]): int(row["tokens"])
        for row in layers
        if 0 < int(row.get("tokens", 0)) < int(row["columns"])
    }
    return dict(sorted(found.items(), key=lambda entry: (entry[1], entry[0])))


def warning(found: Mapping[str, int], total: int) -> str:
    """One line for a person.

    Args:
        found: of `scarce`, not empty.
        total: how many matrices were treated.
    """
    name, tokens = next(iter(found.items()))
    return (
        f"warning: {len(found)} of {total} matrices saw fewer calibration tokens than they have inputs, "
        f"fewest {name} ({tokens}); give more --samples or longer --sequence-length"
    )
