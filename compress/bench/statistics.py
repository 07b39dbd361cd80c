"""Intervals on paired differences.

Samples are not independent: tokens of a window, iterations of a launch belong together. So clusters are
resampled, never samples, and both arms of a pair are resampled together. With 20 clusters or more the
interval is the percentile bootstrap (Efron and Tibshirani 1993, "An Introduction to the Bootstrap",
chapter 13, by `scipy.stats.bootstrap`); with fewer, a percentile of a few values covers too little, and
Student's t on the jackknife's standard error is used (chapter 11; t with n - 1 degrees of freedom).
Ratios are found on the logarithmic scale.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from compress.core.measurement import Effect, EffectKind, Measurement, Summary

BOOTSTRAP_CLUSTERS: Final = 20
"""From this many clusters on, the bootstrap is used."""

Array = NDArray[np.float64]


class Incomparable(Exception):
    """Two measurements that must not be compared; the message says why."""


@dataclass(frozen=True)
class _Sums:
    """Per cluster: the total weight and the weighted sum, over which every summary is a function."""

    weight: Array
    total: Array


def effect(
    after: Measurement,
    before: Measurement | None,
    kind: EffectKind,
    *,
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Effect:
    """How an arm stands, by itself (``value``) or against its reference, with one-sided bounds.

    Raises:
        Incomparable: a value is missing, or the two were not measured on the same things.
    """
    if after.value is None:
        raise Incomparable(f"AFTER is n/a: {after.reason}")
    arms = [after]
    if kind != "value":
        if before is None:
            raise Incomparable("there is no BEFORE")
        if before.value is None:
            raise Incomparable(f"BEFORE is n/a: {before.reason}")
        _check_pair(before, after)
        if kind == "ratio" and before.value == 0:
            raise Incomparable("BEFORE is 0, so nothing can be a share of it")
        arms = [before, after]
    values = [arm.value for arm in arms if arm.value is not None]
    point = values[-1] if kind == "value" else _combined(kind, values[0], values[1])
    if all(arm.summary == "exact" for arm in arms):
        return Effect(kind=kind, point=point, low=point, high=point, confidence=confidence, method="exact")
    if any(not arm.samples for arm in arms):
        raise Incomparable("one of the two has no samples")
    sums = [_cluster_sums(arm) for arm in arms]
    low, high, method = _bounds(sums, after.summary, kind, confidence, resamples, seed)
    return Effect(kind=kind, point=point, low=low, high=high, confidence=confidence, method=method)


def _check_pair(before: Measurement, after: Measurement) -> None:
    if (before.unit, before.summary) != (after.unit, after.summary):
        raise Incomparable(
            f"one is {before.summary} in '{before.unit}', the other {after.summary} in '{after.unit}'"
        )
    for name in sorted({*before.conditions, *after.conditions}):
        ours, theirs = before.conditions.get(name), after.conditions.get(name)
        if ours != theirs:
            raise Incomparable(f"measured under another {name}: {_short(ours)} and {_short(theirs)}")
    if (before.weights, before.clusters) != (after.weights, after.clusters):
        raise Incomparable("the samples do not pair: other launches, windows or token counts")
    if len(before.samples) != len(after.samples):
        raise Incomparable(f"{len(before.samples)} and {len(after.samples)} samples do not pair")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _combined(kind: EffectKind, before: float, after: float) -> float:
    return after / before if kind == "ratio" else after - before


def _cluster_sums(measurement: Measurement) -> _Sums:
    values = np.asarray(measurement.samples, dtype=np.float64)
    if measurement.summary == "geometric-mean":
        values = np.log(values)
    weights = (
        np.ones_like(values)
        if measurement.weights is None
        else np.asarray(measurement.weights, dtype=np.float64)
    )
    if measurement.clusters is None:
        return _Sums(weights, weights * values)
    _, index = np.unique(np.asarray(measurement.clusters), return_inverse=True)
    return _Sums(
        np.bincount(index, weights).astype(np.float64),
        np.bincount(index, weights * values).astype(np.float64),
    )


def _statistic(summary: Summary, kind: EffectKind) -> Callable[..., Array]:
    """The compared number on the scale where bounds are found: logarithmic for ratios.

    Its arguments are weight and total of each arm in turn, clusters along the last axis.
    """
    exponential = summary in ("exponential-mean", "geometric-mean")

    def means(columns: Sequence[Array], axis: int) -> list[Array]:
        return [
            np.sum(columns[at + 1], axis=axis) / np.sum(columns[at], axis=axis)
            for at in range(0, len(columns), 2)
        ]

    def statistic(*columns: Array, axis: int = -1) -> Array:
        found = means(columns, axis)
        if kind == "ratio":
            return found[1] - found[0] if exponential else np.asarray(np.log(found[1] / found[0]))
        levels = [np.asarray(np.exp(mean)) if exponential else mean for mean in found]
        return levels[0] if kind == "value" else levels[1] - levels[0]

    return statistic


def _bounds(
    sums: Sequence[_Sums], summary: Summary, kind: EffectKind, confidence: float, resamples: int, seed: int
) -> tuple[float | None, float | None, str]:
    columns = [column for arm in sums for column in (arm.weight, arm.total)]
    clusters = len(columns[0])
    back = math.exp if kind == "ratio" else float
    if clusters < 2:
        return None, None, "a single independent unit gives no interval"
    statistic = _statistic(summary, kind)
    point = float(statistic(*columns))
    if not math.isfinite(point):
        raise Incomparable("a ratio of these samples is not finite")
    if clusters < BOOTSTRAP_CLUSTERS:
        low, high = _student(columns, statistic, point, confidence)
        return back(low), back(high), f"Student t, jackknife over {clusters} clusters"
    found = stats.bootstrap(
        columns,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=256,
        confidence_level=2 * confidence - 1,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return back(found.low), back(found.high), f"bootstrap over {clusters} clusters"


def _student(
    columns: Sequence[Array], statistic: Callable[..., Array], point: float, confidence: float
) -> tuple[float, float]:
    count = len(columns[0])
    without = [statistic(*(np.delete(column, left) for column in columns)) for left in range(count)]
    leave_one_out = np.asarray(without, dtype=np.float64)
    spread = np.sum((leave_one_out - leave_one_out.mean()) ** 2)
    error = math.sqrt((count - 1) / count * float(spread))
    reach = float(stats.t.ppf(confidence, count - 1)) * error
    return point - reach, point + reach
