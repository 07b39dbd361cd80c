"""Intervals against closed forms, brute force and simulation."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from compress.bench.statistics import Incomparable, effect, mcnemar
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


def test_mcnemar_against_the_enumeration_of_all_outcomes() -> None:
    before, after = [1.0] * 9 + [0.0] * 6, [0.0] * 2 + [1.0] * 7 + [1.0] * 5 + [0.0]
    found = mcnemar(sampled(before), sampled(after))
    assert found is not None
    assert (found.right_to_wrong, found.wrong_to_right) == (2, 5)
    chance = [math.comb(7, k) / 2**7 for k in range(8)]
    assert found.p_value == pytest.approx(sum(p for p in chance if p <= chance[2] + 1e-12))
    assert mcnemar(sampled([0.5, 1.0]), sampled([1.0, 1.0])) is None


def test_no_changed_answer_is_no_certainty() -> None:
    """Of 100 answers none changed; 3% of lost answers would have left no trace in one case of twenty."""
    right = [1.0, 0.0] * 50
    found = effect(sampled(right), sampled(right), "difference")
    assert (found.point, found.method) == (0.0, "exact, over 100 examples")
    assert found.low is not None
    assert found.low < -(1 - 0.05 ** (1 / 100))
    ratio = effect(sampled(right), sampled(right), "ratio")
    assert ratio.low == pytest.approx(1 + found.low / 0.5)


def test_exact_bounds_hold_as_often_as_they_say() -> None:
    """Over every outcome of 12 examples that lose an answer with probability 0.2 and win none."""
    missed = 0.0
    for lost in range(10):
        after = [0.0] * lost + [1.0] * (12 - lost)
        found = effect(sampled(after), sampled([1.0] * 12), "difference", confidence=0.95)
        assert found.high is not None
        missed += stats.binom.pmf(lost, 12, 0.2) * (found.high < -0.2)
    assert missed <= 0.05


def test_launches_and_their_iterations_are_resampled_in_two_stages() -> None:
    """The spread is that of launches plus that of iterations, as the two-stage bootstrap has it."""
    generator = np.random.default_rng(5)
    launches, iterations = 40, 5
    logs = generator.normal(0, 0.02, (launches, 1)) + generator.normal(0, 0.05, (launches, iterations))
    clusters = [launch for launch in range(launches) for _ in range(iterations)]
    rates = sampled(np.exp(logs).ravel(), "geometric-mean", clusters=clusters)
    found = effect(rates, None, "value", resamples=20_000)
    assert "40 launches and their iterations" in found.method
    means = logs.mean(1)
    error = math.sqrt((means.var() + logs.var(1).mean() / iterations) / launches)
    assert found.low is not None
    assert math.log(found.low) == pytest.approx(means.mean() - 1.645 * error, abs=0.1 * error)


def test_a_recovery_is_the_share_of_the_lost_nats_that_came_back() -> None:
    generator = np.random.default_rng(8)
    base = generator.normal(2.0, 0.3, 60)
    lost = base + generator.normal(1.0, 0.1, 60)
    won = lost - 0.7 + generator.normal(0, 0.1, 60)
    before, damaged, after = (sampled(nats, "exponential-mean", better="lower") for nats in (base, lost, won))
    found = effect(after, before, "recovery", damaged=damaged)
    share = (lost.mean() - won.mean()) / (lost.mean() - base.mean())
    assert found.point == pytest.approx(share)
    drawn = generator.integers(60, size=(20_000, 60))
    means = [nats[drawn].mean(1) for nats in (base, lost, won)]
    low, high = np.quantile((means[1] - means[2]) / (means[1] - means[0]), [0.05, 0.95])
    assert found.low == pytest.approx(low, abs=0.01)
    assert found.high == pytest.approx(high, abs=0.01)
    assert effect(before, before, "recovery", damaged=damaged).point == 1.0
    assert effect(damaged, before, "recovery", damaged=damaged).point == 0.0
    with pytest.raises(Incomparable, match="nothing was lost"):
        effect(after, before, "recovery", damaged=before)
    # Of what became better nothing was lost, though getting worse again would be a positive share.
    with pytest.raises(Incomparable, match="nothing was lost"):
        effect(after, damaged, "recovery", damaged=before)
    with pytest.raises(Incomparable, match="no damaged arm"):
        effect(after, before, "recovery")


def test_a_launch_counts_once_however_many_samples_it_had_time_for() -> None:
    """The machine is twice as fast in the second launch; the arms differ by a tenth in both."""
    before = sampled([100.0] * 2 + [200.0] * 4, "geometric-mean", clusters=[0] * 2 + [1] * 4)
    after = sampled([110.0] * 3 + [220.0] * 9, "geometric-mean", clusters=[0] * 3 + [1] * 9)
    found = effect(after, before, "ratio")
    assert found.point == pytest.approx(1.1)
    assert found.low == pytest.approx(1.1)
    other = sampled([110.0] * 3, "geometric-mean", clusters=[0] * 3)
    with pytest.raises(Incomparable, match="other launches"):
        effect(other, before, "ratio")


def test_the_smallest_detectable_change_is_found_four_times_in_five() -> None:
    generator = np.random.default_rng(6)
    noise = generator.normal(0, 0.05, 12)
    least = effect(sampled(np.exp(noise), "geometric-mean"), sampled([1.0] * 12, "geometric-mean"), "ratio")
    assert least.detectable is not None
    found = 0
    for _ in range(400):
        slower = np.exp(generator.normal(math.log1p(least.detectable), noise.std(ddof=1), 12))
        seen = effect(sampled(slower, "geometric-mean"), sampled([1.0] * 12, "geometric-mean"), "ratio")
        found += seen.low is not None and seen.low > 1
    assert 0.72 < found / 400 < 0.88


def test_drawing_how_many_of_each_kind_is_the_bootstrap() -> None:
    generator = np.random.default_rng(0)
    before = (generator.random(400) < 0.7).astype(float)
    after = np.where(generator.random(400) < 0.1, 1 - before, before)
    found = effect(sampled(after), sampled(before), "difference", confidence=0.9, resamples=20_000)
    reference = stats.bootstrap(
        (after - before,),
        np.mean,
        n_resamples=20_000,
        confidence_level=0.8,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert "400 examples" in found.method
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=1 / 400 + 1e-9)


def test_the_method_says_what_is_independent() -> None:
    windows = {"protocol": {"clusters": "window"}}
    found = effect(sampled(range(1, 30), conditions=windows), None, "value")
    assert found.method == "bootstrap over 29 windows"
    launches = sampled([2.0, 3.0, 4.0, 5.0], "geometric-mean", clusters=[0, 0, 1, 1])
    assert "over 2 launches" in effect(launches, launches, "ratio").method


def test_a_share_of_almost_nothing_has_no_ratio() -> None:
    before = [1.0] + [0.0] * 99
    after = [0.0] * 50 + [1.0] * 50
    with pytest.raises(Incomparable, match="no finite number"):
        effect(sampled(after), sampled(before), "ratio")
