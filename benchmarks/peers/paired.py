"""Two quantizers on the same draws and windows: the relative difference and its interval.

Both numbers of a window come from the same tokens, so what makes a window hard cancels. The
statistic is mean(ours) / mean(theirs) - 1 over all draws. Whole clusters are resampled, the same
for both, with all draws of a cluster together: once each window is its own cluster, and once each
document is, which is wider where windows of a document resemble each other. The verdict asks
both, because the documents are few and the windows are not independent.
"""

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

Samples = NDArray[numpy.float64]

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Relative differences as fractions; the bounds are one-sided, each at 95%."""

    mean: float
    of_each_draw: list[float]
    low_by_window: float
    high_by_window: float
    low_by_document: float
    high_by_document: float

    def verdict(self, margin: float) -> str:
        """PASS when surely at most the margin, FAIL when surely above it, else UNDECIDED."""
        if max(self.high_by_window, self.high_by_document) <= margin:
            return "PASS"
        if min(self.low_by_window, self.low_by_document) > margin:
            return "FAIL"
        return "UNDECIDED"


def compare(ours: Samples, theirs: Samples, document: list[int], seed: int = 0) -> Difference:
    """The difference of two arrays [draws, windows]."""
    if ours.shape != theirs.shape or ours.shape[1] != len(document):
        raise ValueError(f"unpaired samples: {ours.shape}, {theirs.shape}, {len(document)} windows")
    low_window, high_window = bounds(ours.sum(0), theirs.sum(0), seed)
    owner = numpy.asarray(document)
    members = (owner == numpy.unique(owner)[:, None]).astype(numpy.float64)
    low_document, high_document = bounds(members @ ours.sum(0), members @ theirs.sum(0), seed)
    return Difference(
        mean=float(ours.sum() / theirs.sum() - 1),
        of_each_draw=(ours.sum(1) / theirs.sum(1) - 1).tolist(),
        low_by_window=low_window,
        high_by_window=high_window,
        low_by_document=low_document,
        high_by_document=high_document,
    )


def bounds(ours: Samples, theirs: Samples, seed: int) -> tuple[float, float]:
    """Percentile bootstrap over clusters: the one-sided lower and the one-sided upper bound."""
    clusters = len(ours)
    counts = numpy.random.default_rng(seed).multinomial(
        clusters, numpy.full(clusters, 1 / clusters), size=RESAMPLES
    )
    low, high = numpy.quantile((counts @ ours) / (counts @ theirs) - 1, [1 - CONFIDENCE, CONFIDENCE])
    return float(low), float(high)
