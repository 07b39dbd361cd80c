"""What every interval takes from a resampled statistic, and from which sample size on it resamples."""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

BOOTSTRAP_CLUSTERS: Final = 20
"""From this many clusters on, the bootstrap is used."""
POWER: Final = 0.8
"""How often an experiment shall find the smallest detectable change."""

Array = NDArray[np.float64]


def spread(drawn: Array, confidence: float) -> tuple[float, float, float]:
    """Standard error, lower and upper percentile bound of a resampled statistic.

    Not finite where a resample is not.

    Args:
        drawn: the statistic of each resample.
        confidence: of each bound by itself.
    """
    with np.errstate(invalid="ignore"):
        low, high = np.quantile(drawn, [1 - confidence, confidence])
        return float(np.std(drawn, ddof=1)), float(low), float(high)


def power_reach(confidence: float, count: int) -> float:
    """Standard errors of the smallest effect that is found as often as `POWER` says."""
    return float(stats.t.ppf(confidence, count - 1) + stats.t.ppf(POWER, count - 1))
