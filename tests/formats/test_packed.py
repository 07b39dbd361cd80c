"""Numbers in float16, exactly or not at all."""

import pytest
import torch

from compress.core.errors import PlanError
from compress.formats.packed import halves, largest_shift


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_float16_holds_comes_back(dtype: torch.dtype) -> None:
    values = torch.tensor([0.5, -0.0078125, 2.0**-24, 65280.0], dtype=dtype)
    assert torch.equal(halves(values, "scale", "m").to(dtype), values)


@pytest.mark.parametrize("value", [1e-9, 1e6, float("inf")])
def test_what_has_no_float16_is_refused_even_rounded(value: float) -> None:
    with pytest.raises(PlanError, match="out of float16's range"):
        halves(torch.tensor([1.0, value]), "scale", "m", "round")


def test_zero_is_no_number_that_was_lost() -> None:
    assert torch.equal(halves(torch.zeros(2), "offset", "m"), torch.zeros(2, dtype=torch.float16))


def test_bfloat16_has_numbers_that_float16_rounds() -> None:
    # Eight digits below 2^-17 reach below float16's smallest step, 2^-24.
    small = torch.tensor([(1 + 2.0**-7) * 2.0**-18], dtype=torch.bfloat16)
    with pytest.raises(PlanError, match="1 of 1 are not exact"):
        halves(small, "scale", "m")
    assert 0 < largest_shift(small, halves(small, "scale", "m", "round")) < 2.0**-6
