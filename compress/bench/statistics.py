"""Intervals on paired differences.

Samples are not independent: tokens of a window, iterations of a launch belong together. So clusters are
resampled, never samples, and both arms of a pair are resampled together. With 20 clusters or more the
interval is the percentile bootstrap (Efron and Tibshirani 1993, "An Introduction to the Bootstrap",
chapter 13, by `scipy.stats.bootstrap`); with fewer, a percentile of a few values covers too little, and
Student's t on the jackknife's standard error is used (chapter 11; t with n - 1 degrees of freedom).
Timings are resampled in two stages, launches and the turns of each (Davison and Hinkley 1997,
"Bootstrap Methods and their Application", section 3.8). Ratios are found on the logarithmic scale.

Two arms that were timed took turns, so their ratio in a round of launches is the median of the ratios of
what both measured in the same turn: whatever slowed the machine down for longer than a turn falls out of
each ratio, and what hit one sample alone out of the median (docs/decisions/0021).

Answers that are right or wrong have exact intervals where few of them changed: a bootstrap of a sample
without a single change claims certainty.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from compress.bench.resamples import BOOTSTRAP_CLUSTERS, Array, power_reach, spread
from compress.bench.results import Contingency
from compress.bench.turns import is_timed, iterates, ratio_of_turns, two_stages
from compress.core.measurement import Effect, EffectKind, Measurement, Summary

ALIKE: Final = 8
"""Where at least so many clusters are alike on average, how many of each kind are drawn, and not each."""
FEW_CHANGES: Final = 10
"""Below this many changed answers, their share has an exact interval and no bootstrap."""
_EXPONENTIAL: Final = ("exponential-mean", "geometric-mean")
"""Summaries that average logarithms."""
_NOTHING_LOST: Final = "nothing was lost, so nothing can be regained"


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
    damaged: Measurement | None = None,
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Effect:
    """How an arm stands, by itself (``value``) or against its reference, with one-sided bounds.

    A ``recovery`` is (damaged - after) / (damaged - before), of logarithms where they are what is averaged.

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
    if kind == "recovery":
        if damaged is None or damaged.value is None:
            raise Incomparable(
                "there is no damaged arm" if damaged is None else f"it is n/a: {damaged.reason}"
            )
        _check_pair(damaged, after)
        arms = [arms[0], damaged, after]
    values = [arm.value for arm in arms if arm.value is not None]
    if kind == "ratio" and all(is_timed(arm) and arm.samples for arm in arms):
        return ratio_of_turns(arms, confidence, resamples, seed)
    point = _combined(kind, after.summary, values)
    if kind == "recovery":
        _check_loss(before, damaged)
    if all(arm.summary == "exact" for arm in arms):
        return Effect(kind=kind, point=point, low=point, high=point, confidence=confidence, method="exact")
    if any(not arm.samples for arm in arms):
        raise Incomparable("one of the two has no samples")
    found = (
        _exact_change(arms, kind, confidence)
        if kind in ("difference", "ratio") and _few_changes(arms)
        else _bounds(arms, kind, confidence, resamples, seed)
    )
    return Effect(kind=kind, point=point, confidence=confidence, **asdict(found))


@dataclass(frozen=True)
class _Bounds:
    """What `Effect` says of its bounds, in the unit of the effect."""

    low: float | None
    high: float | None
    method: str
    detectable: float | None = None


def mcnemar(before: Measurement, after: Measurement) -> Contingency | None:
    """The exact test of McNemar (1947) on answers that are right (1) or wrong (0).

    ``None`` where the samples are no such answers.

    Raises:
        Incomparable: the two were not measured on the same examples.
    """
    if not (_binary(before) and _binary(after)):
        return None
    _check_pair(before, after)
    lost, won = _changes(before, after)
    p_value = float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0
    return Contingency(right_to_wrong=lost, wrong_to_right=won, p_value=p_value)


def _binary(arm: Measurement) -> bool:
    plain = arm.summary == "mean" and arm.weights is None and arm.clusters is None
    return plain and bool(arm.samples) and {0.0, 1.0}.issuperset(arm.samples)


def _changes(before: Measurement, after: Measurement) -> tuple[int, int]:
    pairs = list(zip(before.samples, after.samples, strict=True))
    return sum(old > new for old, new in pairs), sum(old < new for old, new in pairs)


def _few_changes(arms: Sequence[Measurement]) -> bool:
    return all(_binary(arm) for arm in arms) and sum(_changes(arms[0], arms[1])) < FEW_CHANGES


def _exact_change(arms: Sequence[Measurement], kind: EffectKind, confidence: float) -> _Bounds:
    """Bounds on a change of accuracy from those on both kinds of changed answers.

    Each share has its interval of Clopper and Pearson (1934), at half the error each, so that their
    difference errs at most as often as asked (Bonferroni).
    """
    count = len(arms[0].samples)
    lost, won = (
        stats.binomtest(changed, count).proportion_ci(confidence, method="exact")
        for changed in _changes(arms[0], arms[1])
    )
    # A smaller loss could have left this sample without a single change.
    least = 1 - ((1 - confidence) / 2) ** (1 / count)
    start, unit = (1.0, arms[0].value or 1.0) if kind == "ratio" else (0.0, 1.0)
    return _Bounds(
        start + (won.low - lost.high) / unit,
        start + (won.high - lost.low) / unit,
        f"exact, over {count} examples",
        least / unit,
    )


def _check_pair(before: Measurement, after: Measurement) -> None:
    if (before.unit, before.summary) != (after.unit, after.summary):
        raise Incomparable(
            f"one is {before.summary} in '{before.unit}', the other {after.summary} in '{after.unit}'"
        )
    for name in sorted({*before.conditions, *after.conditions}):
        ours, theirs = before.conditions.get(name), after.conditions.get(name)
        if ours != theirs:
            raise Incomparable(f"measured under another {name}: {_differing(ours, theirs)}")
    if is_timed(before) and is_timed(after):
        # A faster arm may have taken more samples in a launch; what pairs are the launches.
        if set(before.clusters or ()) != set(after.clusters or ()):
            raise Incomparable("the samples do not pair: other launches")
        return
    if (before.weights, before.clusters) != (after.weights, after.clusters):
        raise Incomparable("the samples do not pair: other launches, windows or token counts")
    if len(before.samples) != len(after.samples):
        raise Incomparable(f"{len(before.samples)} and {len(after.samples)} samples do not pair")


def _differing(ours: Any, theirs: Any) -> str:
    """What is not the same; of two mappings the differing entries alone."""
    if not (isinstance(ours, Mapping) and isinstance(theirs, Mapping)):
        return f"{_short(ours)} and {_short(theirs)}"
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return "; ".join(f"{name} {_short(ours.get(name))} and {_short(theirs.get(name))}" for name in names)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _combined(kind: EffectKind, summary: Summary, values: Sequence[float]) -> float:
    """An effect from the values of its arms, AFTER last."""
    if kind == "value":
        return values[-1]
    if kind == "recovery":
        levels = [math.log(value) for value in values] if summary in _EXPONENTIAL else values
        if levels[1] == levels[0]:
            raise Incomparable(_NOTHING_LOST)
        return (levels[1] - levels[2]) / (levels[1] - levels[0])
    return values[1] / values[0] if kind == "ratio" else values[1] - values[0]


def _check_loss(before: Measurement | None, damaged: Measurement | None) -> None:
    """Refuse a share of what is no loss: of a gain, getting worse would count as regaining."""
    if before is None or damaged is None or before.value is None or damaged.value is None:
        return
    change = damaged.value - before.value
    if before.better == "neither":
        raise Incomparable("no direction of this quantity is a loss")
    if (change > 0) != (before.better == "lower"):
        raise Incomparable(_NOTHING_LOST)


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
    _, index, counts = np.unique(np.asarray(measurement.clusters), return_inverse=True, return_counts=True)
    if is_timed(measurement):
        # A launch counts once, however many samples it had time for.
        weights = weights / counts[index]
    return _Sums(
        np.bincount(index, weights).astype(np.float64),
        np.bincount(index, weights * values).astype(np.float64),
    )


def _units(measurement: Measurement) -> str:
    """What is independent in a measurement, for a reader."""
    protocol = measurement.conditions.get("protocol")
    if isinstance(protocol, Mapping) and "clusters" in protocol:
        return f"{protocol['clusters']}s"
    if measurement.summary == "geometric-mean" and measurement.clusters is not None:
        return "launches"
    return "examples" if measurement.clusters is None else "clusters"


def _statistic(summary: Summary, kind: EffectKind) -> Callable[..., Array]:
    """The compared number on the scale where bounds are found: logarithmic for ratios.

    Its arguments are weight and total of each arm in turn, clusters along the last axis.
    """
    exponential = summary in _EXPONENTIAL

    def means(columns: Sequence[Array], axis: int) -> list[Array]:
        return [
            np.sum(columns[at + 1], axis=axis) / np.sum(columns[at], axis=axis)
            for at in range(0, len(columns), 2)
        ]

    def statistic(*columns: Array, axis: int = -1) -> Array:
        found = means(columns, axis)
        if summary == "root-mean":
            found = [np.sqrt(mean) for mean in found]
        if kind == "recovery":
            return np.asarray((found[1] - found[2]) / (found[1] - found[0]))
        if kind == "ratio":
            return found[1] - found[0] if exponential else np.asarray(np.log(found[1] / found[0]))
        levels = [np.asarray(np.exp(mean)) if exponential else mean for mean in found]
        return levels[0] if kind == "value" else levels[1] - levels[0]

    return statistic


def _bounds(
    arms: Sequence[Measurement], kind: EffectKind, confidence: float, resamples: int, seed: int
) -> _Bounds:
    summary = arms[-1].summary
    sums = [_cluster_sums(arm) for arm in arms]
    columns = [column for arm in sums for column in (arm.weight, arm.total)]
    clusters = len(columns[0])
    if clusters < 2:
        return _Bounds(None, None, "a single independent unit gives no interval")
    statistic = _statistic(summary, kind)
    point = float(statistic(*columns))
    if not math.isfinite(point):
        raise Incomparable("a ratio of these samples is not finite")
    if clusters < BOOTSTRAP_CLUSTERS:
        method = f"Student t, jackknife over {clusters} {_units(arms[-1])}"
        error = _jackknife_error(columns, statistic)
        reach = float(stats.t.ppf(confidence, clusters - 1)) * error
        low, high = point - reach, point + reach
    elif summary == "geometric-mean" and all(iterates(arm) for arm in arms):
        drawn = two_stages(arms, statistic, resamples, seed)
        method = f"bootstrap over {clusters} launches and their iterations"
        error, low, high = spread(drawn, confidence)
    elif (kinds := np.unique(np.stack(columns), axis=1, return_counts=True))[0].shape[1] * ALIKE <= clusters:
        drawn = _by_kind(*kinds, statistic, resamples, seed)
        method = f"bootstrap over {clusters} {_units(arms[-1])}"
        error, low, high = spread(drawn, confidence)
    else:
        found = _bootstrapped(columns, statistic, 2 * confidence - 1, resamples, seed)
        method = f"bootstrap over {clusters} {_units(arms[-1])}"
        error = float(found.standard_error)
        low, high = float(found.confidence_interval.low), float(found.confidence_interval.high)
    if not all(math.isfinite(number) for number in (low, high, error)):
        raise Incomparable("the samples are too few for this: a resample of them gives no finite number")
    least = error * power_reach(confidence, clusters)
    if kind == "ratio":
        return _Bounds(math.exp(low), math.exp(high), method, math.expm1(least))
    return _Bounds(low, high, method, least)


def _by_kind(
    columns: Array, counts: NDArray[np.int64], statistic: Callable[..., Array], resamples: int, seed: int
) -> Array:
    """The statistic of resampled clusters of a few kinds, such as answers gained, lost and unchanged.

    How often each kind is drawn is multinomial, which is the same bootstrap without a draw for every cluster.

    Args:
        columns: weights and totals of each kind, ``[columns, kinds]``.
        counts: clusters of each kind, ``[kinds]``.
    """
    clusters = int(counts.sum())
    drawn = np.random.default_rng(seed).multinomial(clusters, counts / clusters, size=resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(statistic(*(drawn * column for column in columns), axis=-1), dtype=np.float64)


def _bootstrapped(
    columns: Sequence[Array], statistic: Callable[..., Array], level: float, resamples: int, seed: int
) -> Any:
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        # Samples without any spread are no accident here: a model beside its own copy.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        return stats.bootstrap(
            columns,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=256,
            confidence_level=level,
            method="percentile",
            rng=np.random.default_rng(seed),
        )


def _jackknife_error(columns: Sequence[Array], statistic: Callable[..., Array]) -> float:
    """Standard error of a statistic, leaving out one cluster after the other."""
    count = len(columns[0])
    without = [statistic(*(np.delete(column, left) for column in columns)) for left in range(count)]
    leave_one_out = np.asarray(without, dtype=np.float64)
    spread = np.sum((leave_one_out - leave_one_out.mean()) ** 2)
    return math.sqrt((count - 1) / count * float(spread))
