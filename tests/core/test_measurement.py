"""A measurement has a value or a reason; samples make a value by their summary."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from compress.core.measurement import Measurement, summarize


def test_a_value_or_a_reason() -> None:
    with pytest.raises(ValidationError, match="either a value or a reason"):
        Measurement()
    with pytest.raises(ValidationError, match="either a value or a reason"):
        Measurement(value=1.0, reason="both")
    with pytest.raises(ValidationError, match="finite"):
        Measurement(value=math.nan)


def test_missing_is_never_zero() -> None:
    measurement = Measurement.missing("no GPU", unit="B")
    assert measurement.value is None
    assert measurement.reason == "no GPU"


def test_samples_that_are_not_finite_make_no_value() -> None:
    measurement = Measurement.sampled([1.0, math.nan, math.inf], summary="mean")
    assert measurement.reason == "2 of 3 samples are NaN or infinite"
    assert Measurement.sampled([], summary="mean").reason == "no sample was taken"
    assert Measurement.sampled([1e4], summary="exponential-mean").value is None


def test_summaries() -> None:
    assert summarize([1.0, 2.0, 6.0], None, "mean") == pytest.approx(3.0)
    assert summarize([1.0, 3.0], [3.0, 1.0], "mean") == pytest.approx(1.5)
    assert summarize([2.0, 8.0], None, "geometric-mean") == pytest.approx(4.0)
    assert summarize([math.log(2.0), math.log(8.0)], None, "exponential-mean") == pytest.approx(4.0)
    with pytest.raises(ValueError, match="positive"):
        summarize([1.0, 0.0], None, "geometric-mean")
    with pytest.raises(ValueError, match="not made from samples"):
        summarize([1.0], None, "exact")


def test_columns_are_as_long_as_the_samples() -> None:
    with pytest.raises(ValidationError, match="1 weights for 2 samples"):
        Measurement(value=1.0, samples=(1.0, 1.0), weights=(1.0,))


def test_it_survives_json() -> None:
    measurement = Measurement.sampled(
        [1.5, 2.5], summary="mean", unit="nat", better="lower", weights=[1, 2], clusters=[0, 0]
    )
    assert Measurement.model_validate_json(measurement.model_dump_json()) == measurement


def launches(**others: Any) -> Measurement:
    return Measurement.sampled(
        [1.0, 3.0, 10.0, 30.0], summary="mean", clusters=[0, 0, 1, 1], unit="s", better="lower", **others
    )


def test_samples_of_what_cannot_be_trusted_are_kept_and_not_used() -> None:
    marked = launches(distrust={1: "hot"})
    assert (marked.value, marked.invalid) == (2.0, False)
    assert marked.samples == (1.0, 3.0, 10.0, 30.0)
    assert Measurement.model_validate_json(marked.model_dump_json()) == marked
    assert marked.without({1}) == Measurement.sampled(
        [1.0, 3.0], summary="mean", clusters=[0, 0], unit="s", better="lower"
    )
    weighted = launches(distrust={1: "hot"}, weights=[3.0, 1.0, 9.0, 9.0])
    assert weighted.value == pytest.approx(1.5)


def test_nothing_that_can_be_trusted_is_no_value() -> None:
    none = launches(distrust={0: "hot", 1: "hot"})
    assert (none.value, none.reason, none.invalid) == (None, "not to be trusted: hot", True)
    assert len(none.samples) == 4


def test_a_launch_is_marked_once_for_every_reason() -> None:
    launch = Measurement.sampled([1.0, 2.0], summary="mean").doubted("hot").doubted("late")
    assert launch.distrust == {0: "hot; late"}
    assert launch.clusters == (0, 0)
    assert launch.invalid
    absent = Measurement.missing("no GPU")
    assert absent.doubted("hot") == absent
    assert not absent.invalid
