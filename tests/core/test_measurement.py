"""A measurement has a value or a reason; samples make a value by their summary."""

import math

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
