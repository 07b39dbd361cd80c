"""The range of a layer's input, and the scale that is made of it."""

import pytest
import torch

from compress.core.errors import CalibrationError
from compress.core.scheme import Scheme
from compress.numerics.hessian import Hessian
from compress.numerics.input_range import InputRange, Ranged, input_scale

INT8 = Scheme(8, None, activations="static")
FP8 = Scheme(8, None, format="fp8", activations="static")
NVFP4 = Scheme(4, 16, format="nvfp4", activations="static")


def ranged(*rows: list[float], inner: bool = False) -> Ranged:
    statistic = Ranged(Hessian(2) if inner else None, 2)
    for row in rows:
        statistic.add(torch.tensor([row]))
    return statistic


def test_the_largest_of_all_rows_counts() -> None:
    seen = InputRange(2)
    seen.add(torch.tensor([[1.0, -7.0], [3.0, 2.0]]).to(torch.bfloat16))
    seen.add(torch.tensor([[5.0, 0.0]]))
    assert (seen.largest, seen.tokens) == (7.0, 3)


def test_a_rounders_own_statistic_sees_the_same_rows() -> None:
    statistic = ranged([1.0, 2.0], [3.0, -4.0], inner=True)
    alone = Hessian(2)
    alone.add(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
    assert isinstance(statistic.inner, Hessian)
    assert torch.equal(statistic.inner.diagonal, alone.diagonal)
    assert statistic.tokens == statistic.inner.tokens == 2


@pytest.mark.parametrize(("scheme", "expected"), [(INT8, 8 / 127), (FP8, 8 / 448), (NVFP4, 448 * 6 / 8)])
def test_the_largest_input_becomes_the_largest_number(scheme: Scheme, expected: float) -> None:
    scale = input_scale(scheme, ranged([1.0, -8.0]), torch.float32)
    assert scale.shape == (1,)
    assert float(scale) == pytest.approx(expected, rel=1e-6)


def test_scales_have_the_dtype_in_which_they_are_stored() -> None:
    assert input_scale(FP8, ranged([1.0, 2.0]), torch.bfloat16).dtype == torch.bfloat16
    assert input_scale(NVFP4, ranged([1.0, 2.0]), torch.bfloat16).dtype == torch.float32
    # An input that is always zero, and one too small for half precision, still have a scale.
    assert float(input_scale(INT8, ranged([0.0, 0.0]), torch.float16)) == 1.0
    assert float(input_scale(INT8, ranged([1e-9, 0.0]), torch.float16)) > 0


def test_inputs_that_tell_nothing_are_refused() -> None:
    with pytest.raises(CalibrationError, match="no calibration token"):
        input_scale(INT8, ranged(), torch.float32)
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        input_scale(INT8, ranged([torch.inf, 1.0]), torch.float32)
    with pytest.raises(CalibrationError, match="no scale in float16"):
        input_scale(INT8, ranged([1e9, 1.0]), torch.float16)
