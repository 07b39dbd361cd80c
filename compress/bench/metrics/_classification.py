"""Scores of a whole set of classified examples, and how much each example has to do with them.

Such a score is no mean over examples. Its samples are the score plus each example's centred jackknife
influence, ``n * score - (n - 1) * (score without the example)`` less the mean of these over all examples:
their mean is the score, and their variance is the jackknife's (Efron and Tibshirani 1993, "An
Introduction to the Bootstrap", chapter 11), so that two arms are compared example by example.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

BINS: Final = 15
"""Of equal width, for the calibration error."""

Array = NDArray[np.float64]
Numbers = NDArray[np.int64]


def influence(score: float, without: Array) -> list[float]:
    """Samples with the score as their mean.

    Args:
        score: of all examples.
        without: score of all examples but one, for each one, ``[examples]``.
    """
    pseudo = len(without) * score - (len(without) - 1) * without
    return [float(value) for value in score + (pseudo - pseudo.mean())]


def macro(gold: Numbers, chosen: Numbers) -> dict[str, list[float]]:
    """Precision, recall and F1, each the plain mean over the classes that occur.

    A class that is never chosen has precision 0, one that is never right in the data recall 0.

    Args:
        gold, chosen: class numbers, ``[examples]``.

    Returns:
        Samples of ``precision``, ``recall`` and ``f1``, as `influence` gives them.
    """
    classes, places = np.unique(np.concatenate([gold, chosen]), return_inverse=True)
    rows, columns = places[: len(gold)], places[len(gold) :]
    table = np.zeros((len(classes), len(classes)))
    np.add.at(table, (rows, columns), 1.0)
    scores = _of_table(table)
    if len(gold) < 2:
        return {name: [score] for name, score in scores.items()}
    # Examples of the same cell have the same influence.
    by_cell: dict[tuple[int, int], dict[str, float]] = {}
    for cell in set(zip(rows.tolist(), columns.tolist(), strict=True)):
        smaller = table.copy()
        smaller[cell] -= 1.0
        by_cell[cell] = _of_table(smaller)
    cells = list(zip(rows.tolist(), columns.tolist(), strict=True))
    return {
        name: influence(score, np.array([by_cell[cell][name] for cell in cells]))
        for name, score in scores.items()
    }


def _of_table(table: Array) -> dict[str, float]:
    """Macro scores of a table of counts, right classes by chosen classes."""
    right = np.diag(table)
    precision = _share(right, table.sum(0))
    recall = _share(right, table.sum(1))
    f1 = _share(2 * right, table.sum(0) + table.sum(1))
    return {"precision": float(precision.mean()), "recall": float(recall.mean()), "f1": float(f1.mean())}


def _share(part: Any, whole: Any) -> Array:
    shares: Array = np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)
    return shares


def calibration_error(confidence: Array, right: Array) -> list[float]:
    """Expected calibration error over bins of equal width (Guo et al. 2017, equation 3).

    Args:
        confidence: probability of the chosen class, ``[examples]``; a bin holds its upper bound.
        right: 1 where it is the right one, else 0.

    Returns:
        Samples of the error, as `influence` gives them.
    """
    count = len(right)
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    gap = right - confidence
    sums = np.bincount(bins, weights=gap, minlength=BINS)
    total = float(np.abs(sums).sum())
    if count < 2:
        return [total / count]
    without = total - np.abs(sums[bins]) + np.abs(sums[bins] - gap)
    return influence(total / count, without / (count - 1))
