"""Ratios of timings: medians of turns, against plain loops, scipy's interval and simulated machines."""

import math
from statistics import fmean, median
from typing import Any

import numpy as np
import pytest
from scipy import stats

from compress.bench.statistics import effect
from compress.core.measurement import Measurement


def timed(rounds: Any) -> Measurement:
    """Rates from the samples of each launch."""
    clusters = [launch for launch, samples in enumerate(rounds) for _ in samples]
    samples = [float(sample) for found in rounds for sample in found]
    return Measurement.sampled(samples, summary="geometric-mean", clusters=clusters)


def machine(generator: np.random.Generator, launches: int, turns: int) -> list[np.ndarray]:
    """Two equal arms on a shared machine: it drifts, and every tenth sample is hit by somebody else."""
    drift = generator.normal(0, 0.2, (launches, turns)).cumsum(1) / math.sqrt(turns)
    arms = []
    for _ in range(2):
        own = generator.normal(0, 0.01, (launches, 1)) + generator.normal(0, 0.02, (launches, turns))
        hits = (generator.random((launches, turns)) < 0.1) * generator.exponential(0.4, (launches, turns))
        arms.append(100 * np.exp(drift + own - hits))
    return arms


def test_the_ratio_is_the_mean_of_the_medians_with_the_t_interval() -> None:
    before, after = machine(np.random.default_rng(0), 7, 9)
    found = effect(timed(after), timed(before), "ratio", confidence=0.95)
    medians = [
        median(math.log(new / old) for old, new in zip(olds, news, strict=True))
        for olds, news in zip(before, after, strict=True)
    ]
    assert math.log(found.point) == pytest.approx(fmean(medians))
    interval = stats.ttest_1samp(medians, 0).confidence_interval(0.90)
    assert found.low is not None
    assert found.high is not None
    assert (math.log(found.low), math.log(found.high)) == pytest.approx((interval.low, interval.high))
    assert found.method == "Student t over 7 launches, medians of turns"


def test_samples_without_a_turn_in_common_count_for_nothing() -> None:
    before, after = machine(np.random.default_rng(1), 4, 6)
    plain = effect(timed(after), timed(before), "ratio")
    longer = [[*samples, 1.0, 2.0] for samples in after]
    assert effect(timed(longer), timed(before), "ratio") == plain
    with pytest.raises(AssertionError):
        assert effect(timed(after[:, ::-1]), timed(before), "ratio") == plain


def test_many_launches_are_resampled_with_their_turns() -> None:
    """Against the same bootstrap in plain loops."""
    before, after = machine(np.random.default_rng(2), 24, 7)
    found = effect(timed(after), timed(before), "ratio", resamples=8_000)
    assert found.method.startswith("bootstrap over 24 launches and their turns")
    logs, generator = np.log(after / before), np.random.default_rng(3)
    drawn = []
    for _ in range(1_500):
        rounds = [logs[launch] for launch in generator.integers(24, size=24)]
        drawn.append(fmean(float(np.median(generator.choice(turns, len(turns)))) for turns in rounds))
    low, high = np.quantile(drawn, [0.05, 0.95])
    assert found.low is not None
    assert found.high is not None
    width = high - low
    assert math.log(found.low) == pytest.approx(low, abs=0.1 * width)
    assert math.log(found.high) == pytest.approx(high, abs=0.1 * width)


@pytest.mark.parametrize("launches", [3, 8, pytest.param(24, marks=pytest.mark.slow)])
def test_bounds_hold_as_often_as_they_say_on_a_shared_machine(launches: int) -> None:
    generator = np.random.default_rng(4)
    experiments = 500
    missed = {"low": 0, "high": 0}
    widths: list[float] = []
    means: list[float] = []
    for _ in range(experiments):
        before, after = machine(generator, launches, 12)
        found = effect(timed(after), timed(before), "ratio", resamples=300)
        assert found.low is not None
        assert found.high is not None
        missed["low"] += found.low > 1
        missed["high"] += found.high < 1
        widths.append(math.log(found.high / found.low))
        logs = np.log(after / before).mean(1)
        means.append(2 * float(stats.t.ppf(0.95, launches - 1)) * logs.std(ddof=1) / math.sqrt(launches))
    # 5% are meant; of 500 experiments more than 8% would be seen less than once in a thousand times.
    assert max(missed.values()) / experiments <= 0.08
    assert fmean(widths) < 0.6 * fmean(means), "means take every hit"


def test_samples_of_one_turn_are_drawn_together() -> None:
    """What slows both arms down at one moment is no difference between them, however large it is."""
    generator = np.random.default_rng(7)
    launches, turns = 30, 6
    moment = generator.normal(0, 0.3, (launches, turns))
    before, after = (timed(np.exp(moment + generator.normal(0, 0.01, (launches, turns)))) for _ in range(2))
    found = effect(after, before, "ratio")
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low < 4 * 1.645 * 0.01 * math.sqrt(2 / (launches * turns))
