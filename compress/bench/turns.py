"""Timings: launches in rounds, whose arms took turns sample by sample.

Whatever slows a machine down for longer than a turn (another tenant, a lower clock) falls out of the ratio
of what two arms measured in the same turn. What hits a single sample does not. On a shared machine such hits
are frequent and large, and the median of a round's ratios lets them go (docs/decisions/0021).
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from compress.bench.resamples import BOOTSTRAP_CLUSTERS, Array, power_reach, spread
from compress.core.measurement import Effect, Measurement


def is_timed(arm: Measurement) -> bool:
    """Whether these are timed samples of launches."""
    return arm.summary == "geometric-mean" and arm.clusters is not None and arm.weights is None


def ratio_of_turns(arms: Sequence[Measurement], confidence: float, resamples: int, seed: int) -> Effect:
    """AFTER over BEFORE, of timings: the mean over rounds of launches of the median ratio of their turns.

    Where an arm had time for more samples in a launch, those beyond the other's last have no turn in common.

    Args:
        arms: BEFORE and AFTER, timed in the same launches.
        confidence: of each bound.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    before, after = (_by_launch(arm) for arm in arms)
    rounds = []
    for launch, samples in before.items():
        turns = min(len(samples), len(after[launch]))
        rounds.append(after[launch][:turns] - samples[:turns])
    medians = np.asarray([np.median(turns) for turns in rounds])
    point, count = float(medians.mean()), len(rounds)

    def found(low: float | None, high: float | None, method: str, error: float | None) -> Effect:
        least = None if error is None else error * power_reach(confidence, count)
        return Effect(
            kind="ratio",
            point=math.exp(point),
            low=None if low is None else math.exp(low),
            high=None if high is None else math.exp(high),
            confidence=confidence,
            method=method,
            detectable=None if least is None else math.expm1(least),
        )

    if count < 2:
        return found(None, None, "a single independent unit gives no interval", None)
    if count < BOOTSTRAP_CLUSTERS:
        # Of a mean, the jackknife's standard error is the usual one.
        error = float(medians.std(ddof=1)) / math.sqrt(count)
        reach = float(stats.t.ppf(confidence, count - 1)) * error
        method = f"Student t over {count} launches, medians of turns"
        return found(point - reach, point + reach, method, error)
    error, low, high = spread(_resampled_medians(rounds, resamples, seed), confidence)
    return found(low, high, f"bootstrap over {count} launches and their turns, medians of turns", error)


def _by_launch(arm: Measurement) -> dict[int, Array]:
    """Logarithms of the samples of each launch, in the order of their turns."""
    launches = np.asarray(arm.clusters)
    logs = np.log(np.asarray(arm.samples, dtype=np.float64))
    return {int(launch): logs[launches == launch] for launch in np.unique(launches)}


def _resampled_medians(rounds: Sequence[Array], resamples: int, seed: int) -> Array:
    """Means over resampled rounds of the medians of their resampled turns, ``[resamples]``."""
    generator = np.random.default_rng(seed)
    # How often each round is drawn is multinomial; each time, its turns are drawn anew.
    counts = generator.multinomial(len(rounds), np.full(len(rounds), 1 / len(rounds)), size=resamples)
    total = np.zeros(resamples)
    for turns, drawn in zip(rounds, counts.T, strict=True):
        medians = np.median(
            turns[generator.integers(len(turns), size=(int(drawn.sum()), len(turns)))], axis=1
        )
        total += np.bincount(np.repeat(np.arange(resamples), drawn), medians, minlength=resamples)
    return total / len(rounds)


def iterates(arm: Measurement) -> bool:
    """Whether every launch has the same number of iterations, two at least."""
    if arm.clusters is None or arm.weights is not None:
        return False
    counts = set(Counter(arm.clusters).values())
    return len(counts) == 1 and counts.pop() > 1


def two_stages(
    arms: Sequence[Measurement], statistic: Callable[..., Array], resamples: int, seed: int
) -> Array:
    """The statistic of resampled launches with resampled iterations, ``[resamples]``.

    Both are drawn for all arms together: a round of launches shares what the machine did at the time, and
    within it the samples of one turn do.
    """
    generator = np.random.default_rng(seed)
    columns: list[Array] = []
    chosen: NDArray[np.int64] | None = None
    within: NDArray[np.int64] | None = None
    for arm in arms:
        # Samples lie in order of launches; `iterates` made sure that they are a rectangle.
        order = np.argsort(np.asarray(arm.clusters), kind="stable")
        logs = np.log(np.asarray(arm.samples, dtype=np.float64)[order]).reshape(
            len(set(arm.clusters or ())), -1
        )
        launches, iterations = logs.shape
        if chosen is None:
            chosen = generator.integers(launches, size=(resamples, launches))
        if within is None or within.shape[-1] != iterations:
            within = generator.integers(iterations, size=(resamples, launches, iterations))
        drawn = logs[chosen[..., None], within].sum(-1)
        columns += [np.full_like(drawn, float(iterations)), drawn]
    return np.asarray(statistic(*columns, axis=-1), dtype=np.float64)
