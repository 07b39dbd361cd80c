"""Launches that cannot be trusted: left out of both arms, and INVALID where too few are left."""

from typing import Any

import pytest

from compress.bench.judging import compare_arms, judge
from compress.bench.results import ArmResult
from compress.bench.statistics import effect
from compress.core.bench import Bench
from compress.core.gate import NO_BASELINE, Gate, Judgement
from compress.core.measurement import Measurement

METRIC = "decode.tokens_per_second"
OPTIONS = Bench(budget=0, resamples=200)
GATE = Gate.of({"metric": METRIC, "test": "non-inferiority", "margin": "10%"})
RATES = {"before": (100.0, 102.0, 98.0, 101.0), "after": (99.0, 101.0, 10.0, 100.0)}


def arm(role: Any, rates: tuple[float, ...], distrust: dict[int, str]) -> ArmResult:
    measured = Measurement.sampled(
        [rate for rate in rates for _ in range(2)],
        summary="geometric-mean",
        unit="token/s",
        better="higher",
        clusters=[launch for launch in range(len(rates)) for _ in range(2)],
        distrust=distrust,
    )
    return ArmResult(
        name=role, model=role, role=role, runtime="r", path="", digest="", measurements={METRIC: measured}
    )


def arms(before: dict[int, str], after: dict[int, str]) -> list[ArmResult]:
    return [arm("before", RATES["before"], before), arm("after", RATES["after"], after)]


def judged(before: dict[int, str], after: dict[int, str], gate: Gate = GATE) -> Judgement:
    (judgement,) = judge([gate], arms(before, after), OPTIONS, 1.0)
    return judgement


def test_a_launch_that_cannot_be_trusted_counts_for_nothing() -> None:
    assert judged({}, {}).verdict == "UNDECIDED"
    judgement = judged({}, {2: "throttled"})
    assert judgement.verdict == "PASS"
    assert "without 1 that cannot be trusted" in judgement.explanation


def test_both_arms_lose_it_so_that_launches_still_pair() -> None:
    left = [arm(role, RATES[role][:1] + RATES[role][3:], {}) for role in ("before", "after")]
    expected = effect(left[1].measurements[METRIC], left[0].measurements[METRIC], "ratio")
    (entry,) = compare_arms(arms({1: "hot"}, {2: "throttled"}), OPTIONS)
    assert entry.ratio is not None
    assert (entry.ratio.low, entry.ratio.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("before", "after"), [({}, {0: "hot", 1: "hot", 2: "hot"}), ({0: "hot", 1: "hot"}, {3: "hot"})]
)
def test_too_few_that_are_left_make_it_invalid(before: dict[int, str], after: dict[int, str]) -> None:
    judgement = judged(before, after)
    assert judgement.verdict == "INVALID"
    assert "1 of 4 launches can be trusted, an interval needs 2" in judgement.explanation
    assert "hot" in judgement.explanation
    (entry,) = compare_arms(arms(before, after), OPTIONS)
    assert entry.ratio is None
    assert "hot" in str(entry.reason)


def test_a_before_that_cannot_be_trusted_is_there_all_the_same() -> None:
    judgement = judged(dict.fromkeys(range(4), "hot"), {})
    assert (judgement.verdict, judgement.baseline) == ("INVALID", True)
    assert judgement.verdict.exit_code != NO_BASELINE
    assert "not to be trusted: hot" in judgement.explanation


def test_a_bound_on_after_alone_does_not_look_at_before() -> None:
    bound = Gate.of({"metric": METRIC, "test": "bound", "at_least": 50})
    assert judged({0: "hot", 1: "hot", 3: "hot"}, {2: "throttled"}, bound).verdict == "PASS"
    assert judged({}, {0: "hot", 1: "hot", 3: "hot"}, bound).verdict == "INVALID"
