"""HQQ as a pass: its promise against rounding to nearest, and its options."""

import itertools

import pytest
import torch

from compress.core.errors import ModelError
from compress.numerics.half_quadratic import group_errors
from compress.quantize.hqq import Hqq
from compress.quantize.rtn import Rtn


def _weight(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 64, generator=generator) + 0.1


@pytest.mark.parametrize(
    ("bits", "symmetric", "group", "integer_range"),
    list(itertools.product([2, 3, 4, 8], [True, False], [16, "channel"], ["full", "narrow"])),
)
def test_no_group_is_worse_than_rounded_to_nearest(
    bits: int, symmetric: bool, group: int | str, integer_range: str
) -> None:
    options = {"bits": bits, "symmetric": symmetric, "group_size": group, "integer_range": integer_range}
    method, nearest = Hqq(**options), Rtn(**options)
    scheme = method.scheme_for("layer")
    ours = method.round(_weight(), None, scheme, torch.bfloat16).quantized
    theirs = nearest.round(_weight(), None, scheme, torch.bfloat16).quantized
    ours.check_values()
    found, plain = (group_errors(_weight(), each) for each in (ours, theirs))
    assert bool((found <= plain).all())
    if bits < 8:
        assert float(found.sum()) < 0.98 * float(plain.sum())


def test_searched_ranges_are_a_further_beginning() -> None:
    method, plain = Hqq(bits=2, group_size=16, clip="norm"), Hqq(bits=2, group_size=16)
    scheme = method.scheme_for("layer")
    errors = [
        group_errors(_weight(), each.round(_weight(), None, scheme, torch.float32).quantized)
        for each in (method, plain)
    ]
    assert bool((errors[0] <= errors[1]).all())
    assert float(errors[0].sum()) < float(errors[1].sum())


def test_scales_are_negative_only_where_asked_for() -> None:
    for signed in (True, False):
        method = Hqq(bits=2, group_size=16, clip="norm", signed_scales=signed)
        rounded = method.round(_weight(), None, method.scheme_for("layer"), torch.float32).quantized
        assert bool((rounded.scale < 0).any()) is signed


def test_without_turns_it_is_rounding_to_nearest() -> None:
    method, nearest = Hqq(bits=3, group_size=16, turns=0), Rtn()
    scheme = method.scheme_for("layer")
    ours = method.round(_weight(), None, scheme, torch.bfloat16).quantized
    theirs = nearest.round(_weight(), None, scheme, torch.bfloat16).quantized
    assert torch.equal(ours.q, theirs.q)
    assert torch.equal(ours.scale, theirs.scale)


def test_it_needs_no_statistic_and_leaves_the_weight_alone() -> None:
    method, weight = Hqq(bits=2, group_size=16), _weight()
    assert method.statistic(64, torch.device("cpu")) is None
    assert not Hqq.calibrated
    method.round(weight, None, method.scheme_for("layer"), torch.float32)
    assert torch.equal(weight, _weight())


def test_weights_that_are_not_finite_are_an_error() -> None:
    weight = _weight()
    weight[3, 3] = torch.inf
    with pytest.raises(ModelError, match="NaN or infinite"):
        Hqq(group_size=16).round(weight, None, Hqq(group_size=16).scheme_for("layer"), torch.bfloat16)
