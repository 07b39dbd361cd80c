"""Two quantizers on the same draws and windows: the relative difference and its interval.

Both numbers of a window come from the same tokens, so what makes a window hard cancels. The
statistic is mean(ours) / mean(theirs) - 1 over all draws. Whole clusters are resampled, the same
for both: once each window is its own cluster and once each document is, with all draws of a cluster
together, and once documents and draws are both resampled, each on its own, because the draws of
calibration tokens are a sample too. The verdict asks all three: the documents and the draws are few,
and the windows are not independent.
"""

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

Samples = NDArray[numpy.float64]

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Relative differences as fractions; the bounds are one-sided, each at the confidence asked for."""

    mean: float
    of_each_draw: list[float]
    low_by_window: float
    high_by_window: float
    low_by_document: float
    high_by_document: float
    low_by_draw: float
    high_by_draw: float

    @property
    def low(self) -> float:
        """The least of the lower bounds."""
        return min(self.low_by_window, self.low_by_document, self.low_by_draw)

    @property
    def high(self) -> float:
        """The greatest of the upper bounds."""
        return max(self.high_by_window, self.high_by_document, self.high_by_draw)

    def verdict(self, margin: float) -> str:
        """PASS when surely at most the margin, FAIL when surely above it, else UNDECIDED."""
        if self.high <= margin:
            return "PASS"
        if self.low > margin:
            return "FAIL"
        return "UNDECIDED"

    def better(self) -> str:
        """PASS when the interval lies below zero, FAIL when it lies above, else UNDECIDED."""
        if self.high < 0:
            return "PASS"
        return "FAIL" if self.low > 0 else "UNDECIDED"


def compare(
    ours: Samples, theirs: Samples, document: list[int], seed: int = 0, confidence: float = CONFIDENCE
) -> Difference:
    """The difference of two arrays [draws, windows]; each bound holds with the given confidence."""
    if ours.shape != theirs.shape or ours.shape[1] != len(document):
        raise ValueError(f"unpaired samples: {ours.shape}, {theirs.shape}, {len(document)} windows")
    owner = numpy.asarray(document)
    members = (owner == numpy.unique(owner)[:, None]).astype(numpy.float64)
    by_document = ours @ members.T, theirs @ members.T
    low_window, high_window = bounds(ours, theirs, seed, confidence)
    low_document, high_document = bounds(*by_document, seed, confidence)
    low_draw, high_draw = bounds(*by_document, seed, confidence, resample_draws=True)
    return Difference(
        mean=float(ours.sum() / theirs.sum() - 1),
        of_each_draw=(ours.sum(1) / theirs.sum(1) - 1).tolist(),
        low_by_window=low_window,
        high_by_window=high_window,
        low_by_document=low_document,
        high_by_document=high_document,
        low_by_draw=low_draw,
        high_by_draw=high_draw,
    )


def bounds(
    ours: Samples, theirs: Samples, seed: int, confidence: float, *, resample_draws: bool = False
) -> tuple[float, float]:
    """Percentile bootstrap of arrays [draws, clusters]: the one-sided lower and the one-sided upper bound."""
    draws, clusters = ours.shape
    numbers = numpy.random.default_rng(seed)
    counts = numbers.multinomial(clusters, numpy.full(clusters, 1 / clusters), size=RESAMPLES)
    of_draws: Samples = numpy.ones((RESAMPLES, draws))
    if resample_draws:
        multiplicity = numbers.multinomial(draws, numpy.full(draws, 1 / draws), size=RESAMPLES)
        of_draws = multiplicity.astype(numpy.float64)
    sums = [(of_draws @ samples * counts).sum(1) for samples in (ours, theirs)]
    low, high = numpy.quantile(sums[0] / sums[1] - 1, [1 - confidence, confidence])
    return float(low), float(high)
