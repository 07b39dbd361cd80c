"""The switch to full float32 products."""

import pytest
import torch

from compress.numerics.precision import full_precision


def test_settings_are_changed_inside_and_restored_after() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    with full_precision():
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_settings_are_restored_after_an_error() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    with pytest.raises(RuntimeError, match="inside"), full_precision():
        raise RuntimeError("inside")
    assert torch.backends.cuda.matmul.fp32_precision == before
