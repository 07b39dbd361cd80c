"""Intervals against closed forms, brute force and simulation."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from compress.bench.statistics import Incomparable, effect
from compress.core.measurement import Measurement, Summary


def sampled(values: Any, summary: Summary = "mean", **others: Any) -> Measurement:
    return Measurement.sampled(list(values), summary=summary, **others)


def test_few_clusters_give_the_paired_t_interval() -> None:
    before, after = np.array([1.0, 2.0, 4.0, 3.0]), np.array([1.5, 2.1, 4.9, 3.2])
    found = effect(sampled(after), sampled(before), "difference", confidence=0.95)
    gaps = after - before
    reach = stats.t.ppf(0.95, 3) * gaps.std(ddof=1) / 2
    assert found.point == pytest.approx(gaps.mean())
    assert (found.low, found.high) == pytest.approx((gaps.mean() - reach, gaps.mean() + reach))


def test_ratio_of_timings_is_the_geometric_mean_of_pairs() -> None:
    before, after = np.array([100.0, 110.0, 90.0]), np.array([120.0, 130.0, 100.0])
    found = effect(sampled(after, "geometric-mean"), sampled(before, "geometric-mean"), "ratio")
    logs = np.log(after / before)
    reach = stats.t.ppf(0.95, 2) * logs.std(ddof=1) / math.sqrt(3)
    assert found.point == pytest.approx(math.exp(logs.mean()))
    assert found.low == pytest.approx(math.exp(logs.mean() - reach))


def test_ratio_of_perplexities_weighs_targets() -> None:
    before = sampled([2.0, 3.0], "exponential-mean", weights=[1.0, 3.0])
    after = sampled([2.2, 3.1], "exponential-mean", weights=[1.0, 3.0])
    assert effect(after, before, "ratio").point == pytest.approx(math.exp((0.2 + 3 * 0.1) / 4))


def test_iterations_of_a_launch_are_one_cluster() -> None:
    launches = [0, 0, 0, 1, 1, 1]
    one = sampled([1.0, 1.0, 1.0, 2.0, 2.0, 2.0], clusters=launches)
    found = effect(one, None, "value")
    assert "2 clusters" in found.method
    reach = stats.t.ppf(0.95, 1) * np.std([1.0, 2.0], ddof=1) / math.sqrt(2)
    assert found.high == pytest.approx(1.5 + reach)


def test_bootstrap_agrees_with_full_enumeration() -> None:
    """With two values of each cluster, the resampled mean is a binomial, whose percentiles are known."""
    values = [0.0, 1.0] * 10
    found = effect(sampled(values), sampled([0.0] * 20), "difference", resamples=20_000)
    low, high = stats.binom.ppf([0.05, 0.95], 20, 0.5) / 20
    assert "bootstrap over 20" in found.method
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.026)


def test_bounds_hold_as_often_as_they_say() -> None:
    """400 experiments of 8 launches each: every bound of 95% misses the truth about one time in twenty."""
    generator = np.random.default_rng(0)
    misses = 0
    for _ in range(400):
        common = generator.normal(0, 0.3, 8)
        before, after = (np.exp(common + generator.normal(0, 0.02, 8)) for _ in range(2))
        found = effect(sampled(after, "geometric-mean"), sampled(before, "geometric-mean"), "ratio")
        assert found.low is not None
        misses += found.low > 1.0
    assert stats.binomtest(misses, 400, 0.05).pvalue > 0.001


def test_pairing_takes_out_what_both_arms_share() -> None:
    generator = np.random.default_rng(1)
    hard = generator.normal(3, 1, 40)
    found = effect(sampled(hard + 0.01), sampled(hard), "difference")
    assert (found.low, found.high) == pytest.approx((0.01, 0.01), abs=1e-9)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(2).normal(0, 1, 30)
    first, second = (effect(sampled(values), None, "value", seed=3) for _ in range(2))
    assert first == second


def test_exact_values_need_no_interval() -> None:
    found = effect(Measurement.exact(50.0, "B"), Measurement.exact(200.0, "B"), "ratio")
    assert (found.point, found.low, found.high, found.method) == (0.25, 0.25, 0.25, "exact")


def test_one_launch_gives_no_interval() -> None:
    found = effect(sampled([2.0, 2.1], clusters=[0, 0]), sampled([1.0, 1.1], clusters=[0, 0]), "ratio")
    assert found.low is None
    assert found.high is None


@pytest.mark.parametrize(
    ("after", "before", "message"),
    [
        (Measurement.missing("crashed"), sampled([1.0, 2.0]), "AFTER is n/a: crashed"),
        (sampled([1.0, 2.0]), Measurement.missing("no tokenizer"), "BEFORE is n/a: no tokenizer"),
        (sampled([1.0, 2.0]), None, "no BEFORE"),
        (sampled([1.0, 2.0]), sampled([1.0, 2.0, 3.0]), "3 and 2 samples"),
        (sampled([1.0, 2.0], clusters=[0, 1]), sampled([1.0, 2.0], clusters=[0, 0]), "do not pair"),
        (sampled([1.0, 2.0]), sampled([1.0, 2.0], unit="s"), "one is mean in 's'"),
        (sampled([1.0, 2.0]), sampled([0.0, 0.0]), "BEFORE is 0"),
    ],
)
def test_what_must_not_be_compared(after: Measurement, before: Measurement | None, message: str) -> None:
    with pytest.raises(Incomparable, match=message):
        effect(after, before, "ratio")


def test_two_protocols_are_never_compared() -> None:
    one, other = (
        sampled([1.0, 2.0], "exponential-mean", conditions={"protocol": {"window": window}})
        for window in (256, 512)
    )
    with pytest.raises(Incomparable, match="another protocol"):
        effect(one, other, "ratio")


def test_every_summary_and_kind_has_bounds_around_its_point() -> None:
    generator = np.random.default_rng(4)
    for clusters, summary, kind in itertools.product(
        (6, 25), ("mean", "geometric-mean", "exponential-mean"), ("value", "difference", "ratio")
    ):
        before, after = (generator.uniform(1, 2, clusters) for _ in range(2))
        found = effect(sampled(after, summary), sampled(before, summary), kind)  # type: ignore[arg-type]
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.point < found.high
