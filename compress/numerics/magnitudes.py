"""The smallest magnitudes of many matrices together, found while only one of them is in memory.

A float32 without its sign, read as an integer, is larger where the magnitude is larger. So the k-th smallest
magnitude of a whole model is found by counting: the upper halves of all bit patterns first, then the lower
halves of those that share the decisive upper half. Two passes over the matrices, whatever their number and
size, and the answer is exact: nothing is sampled, and ties are shared out in the order of the matrices.
"""

from collections.abc import Callable, Iterable
from typing import Final

import torch

from compress.core.errors import ModelError
from compress.numerics.grouping import row_chunks

_HALF: Final = 16
"""Bits of one half of a pattern."""
_UPPER: Final = 1 << (_HALF - 1)
"""Upper halves without a sign."""
_LOWER: Final = 1 << _HALF


def smallest_magnitudes(matrices: Callable[[], Iterable[torch.Tensor]], gone: int) -> list[int]:
    """How many of the smallest magnitudes of all matrices lie in each of them.

    Args:
        matrices: brings all matrices ``[rows, columns]`` one after the other, in the same order each time it
            is called; called twice. Values are looked at in float32.
        gone: how many magnitudes there are to be found, from 0 up to the number of all weights.

    Returns:
        a number for each matrix, which sum up to ``gone``. Of equal magnitudes those of the earlier matrix
        count first.

    Raises:
        ModelError: a weight is NaN or infinite.
        ValueError: there are not so many weights.
    """
    coarse = torch.zeros(_UPPER, dtype=torch.int64)
    for matrix in matrices():
        coarse += _upper_halves(matrix)
    total = int(coarse.sum())
    if not 0 <= gone <= total:
        raise ValueError(f"{gone} of {total} weights were asked for")
    decisive, before = _place(coarse, gone)
    below: list[int] = []
    within: list[tuple[torch.Tensor, torch.Tensor]] = []
    fine = torch.zeros(_LOWER, dtype=torch.int64)
    for matrix in matrices():
        smaller, values, counts = _lower_halves(matrix, decisive)
        below.append(smaller)
        within.append((values, counts))
        fine.index_add_(0, values, counts)
    last, sooner = _place(fine, gone - before)
    ties = gone - before - sooner
    found: list[int] = []
    for smaller, (values, counts) in zip(below, within, strict=True):
        equal = int(counts[values == last].sum())
        taken = min(equal, ties)
        ties -= taken
        found.append(smaller + int(counts[values < last].sum()) + taken)
    return found


def _patterns(part: torch.Tensor) -> torch.Tensor:
    """Magnitudes as integers in the same order."""
    magnitudes = part.float().abs().contiguous()
    if not bool(torch.isfinite(magnitudes).all()):
        raise ModelError(
            "the model holds weights that are NaN or infinite", "restore the model from a sound checkpoint"
        )
    return magnitudes.view(torch.int32).flatten()


def _upper_halves(matrix: torch.Tensor) -> torch.Tensor:
    """How often each upper half occurs, int64 ``[2^15]`` on the CPU."""
    counts = torch.zeros(_UPPER, dtype=torch.int64, device=matrix.device)
    for rows in row_chunks(matrix):
        counts += torch.bincount(_patterns(matrix[rows]) >> _HALF, minlength=_UPPER)
    return counts.cpu()


def _lower_halves(matrix: torch.Tensor, decisive: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Patterns below an upper half, and which lower halves occur beside it, how often; on the CPU."""
    smaller = 0
    beside: list[torch.Tensor] = []
    for rows in row_chunks(matrix):
        patterns = _patterns(matrix[rows])
        upper = patterns >> _HALF
        smaller += int((upper < decisive).sum())
        beside.append(patterns[upper == decisive] & (_LOWER - 1))
    values, counts = torch.unique(torch.cat(beside), return_counts=True)
    return smaller, values.cpu().long(), counts.cpu()


def _place(counts: torch.Tensor, number: int) -> tuple[int, int]:
    """The first place with which the counts reach a number, and how many lie before it."""
    summed = counts.cumsum(0)
    place = int(torch.searchsorted(summed, number)) if number > 0 else 0
    return place, int(summed[place] - counts[place])
