"""Numbers of channels and heads that are tried, the most wanted first."""

from collections.abc import Iterator

KERNEL_MULTIPLES = (128, 64, 32, 16, 8)
"""Widths that kernels like: 128 columns and 64 rows for packed integers, 8 for any tensor core."""
_NEAR = 0.02
"""How far, as a share of all channels, rounding to a kernel's multiple may move the number kept."""


def kernel_multiple(width: int, wanted: int) -> int:
    """The largest multiple that kernels like, divides the width, and hardly moves the number that is kept."""
    for multiple in KERNEL_MULTIPLES:
        nearest = max(multiple, round(wanted / multiple) * multiple)
        if width % multiple == 0 and abs(nearest - wanted) <= _NEAR * width:
            return multiple
    return 1


def nearest_multiples(wanted: int, multiple: int, width: int) -> Iterator[int]:
    """Multiples below the width, the nearest to what is wanted first; of two as near the larger."""
    counts = range(multiple, width, multiple)
    yield from sorted(counts, key=lambda count: (abs(count - wanted), -count))


def nearest_heads(wanted: int, groups: int, parts: int) -> Iterator[tuple[int, int]]:
    """Numbers of groups and of parts in each, the nearest to the wanted product first.

    Of two as near the larger, so that a tie costs nothing; of the same product whole groups are taken out
    rather than parts of each, because keys and values then go as well.
    """
    choices = [(group, part) for group in range(1, groups + 1) for part in range(1, parts + 1)]
    yield from sorted(
        choices,
        key=lambda kept: (
            abs(kept[0] * kept[1] - wanted),
            -kept[0] * kept[1],
            (kept[0] != groups) + (kept[1] != parts),
            kept[0],
        ),
    )


def nearest_groups(wanted: int, heads: int, groups: int, parts: int) -> Iterator[tuple[int, int]]:
    """Numbers of groups and of parts in each, the nearest to the wanted groups first, then to the heads.

    Args:
        wanted: key-value groups.
        heads: query heads.
    """
    choices = [(group, part) for group in range(1, groups + 1) for part in range(1, parts + 1)]
    yield from sorted(
        choices,
        key=lambda kept: (abs(kept[0] - wanted), -kept[0], abs(kept[0] * kept[1] - heads), -kept[1]),
    )
