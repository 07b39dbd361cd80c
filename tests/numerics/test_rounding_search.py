"""Learned rounding against autograd through a written-out quantizer, and against its promises."""

import pytest
import torch

from compress.core.scheme import Scheme
from compress.numerics.affine import ClipSearch, Quantized, choose_scales, quantize, round_to_nearest
from compress.numerics.feedback import round_with_feedback
from compress.numerics.hessian import Hessian
from compress.numerics.refinement import refine
from compress.numerics.rounding_search import Descent, RoundingSearch

ROWS, COLUMNS = 6, 32
SCHEMES = (
    Scheme(2, 8),
    Scheme(3, None),
    Scheme(4, 16, range="narrow"),
    Scheme(8, 8),
    Scheme(2, 8, symmetric=False),
    Scheme(4, None, symmetric=False),
)


def _weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def _hessian() -> Hessian:
    generator = torch.Generator().manual_seed(7)
    hessian = Hessian(COLUMNS)
    mixing = torch.eye(COLUMNS) + 0.3 * torch.randn(COLUMNS, COLUMNS, generator=generator)
    hessian.add(torch.randn(200, COLUMNS, generator=generator) @ mixing)
    return hessian


def _starts(scheme: Scheme, storage: torch.dtype) -> list[Quantized]:
    """The nearest integers on two grids, and those of error feedback, which may lie far from the weights."""
    search = ClipSearch(signed=True)
    scale, zero = choose_scales(_weight(), scheme, storage, search=search)
    hessian = _hessian()
    fed = round_with_feedback(_weight(), scale, zero, scheme, hessian.factor(0.05, "static"))
    return [
        round_to_nearest(_weight(), scheme, storage),
        round_to_nearest(_weight(), scheme, storage, search=search),
        refine(_weight(), fed, hessian, damping=0.05, sweeps=2),
    ]


def _same(left: Quantized, right: Quantized) -> bool:
    zeros = left.zero is None or torch.equal(left.zero, right.zero)
    return zeros and torch.equal(left.q, right.q) and torch.equal(left.scale, right.scale)


class _Through(torch.autograd.Function):
    """Rounding whose gradient is that of the identity."""

    @staticmethod
    def forward(_: object, values: torch.Tensor) -> torch.Tensor:
        return values.round()

    @staticmethod
    def backward(_: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def _relaxed(
    weight: torch.Tensor, scheme: Scheme, start: Quantized, offset: torch.Tensor, factors: torch.Tensor
) -> torch.Tensor:
    """The paper's quantizer on the range of the start, with autograd; weights ``[rows, groups, width]``."""
    first = start.scale.float()
    zero = torch.zeros_like(first) if start.zero is None else start.zero.float()
    if scheme.symmetric:
        scale = first * factors[0]
    else:
        low, high = (scheme.lowest - zero) * first * factors[0], (scheme.highest - zero) * first * factors[1]
        scale = (high - low) / scheme.steps
        zero = scheme.lowest - _Through.apply(low / scale)
    levels = _Through.apply(weight / scale.unsqueeze(-1) + offset) + zero.unsqueeze(-1)
    return (levels.clamp(scheme.lowest, scheme.highest) - zero.unsqueeze(-1)) * scale.unsqueeze(-1)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_begins_with_its_start_to_the_bit(scheme: Scheme, storage: torch.dtype) -> None:
    for start in _starts(scheme, storage):
        search = RoundingSearch(_weight(), start, widest=2.0, ranges=True)
        assert _same(search.quantized(), start)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_slopes_are_those_of_autograd_through_the_rounding(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(3)
    # Many weights lie beyond the range.
    scale, zero = choose_scales(_weight() * 0.4, scheme, torch.float32)
    start = Quantized(quantize(_weight(), scale, zero, scheme), scale, zero, scheme)
    search = RoundingSearch(_weight(), start, widest=2.0, ranges=True)
    search._offsets.copy_(torch.rand(ROWS, COLUMNS, generator=generator) - 0.5)
    search._factors.copy_(torch.rand(search._factors.shape, generator=generator) * 0.5 + 0.7)
    groups = scheme.groups(COLUMNS)
    offset = search._offsets.view(ROWS, groups, -1).clone().requires_grad_(True)
    factors = search._factors.clone().requires_grad_(True)
    values = _relaxed(_weight().view(ROWS, groups, -1), scheme, start, offset, factors)
    torch.testing.assert_close(values.flatten(1), search.quantized().dequantize())
    gradient = torch.randn(values.shape, generator=generator)
    by_offset, by_factors = torch.autograd.grad(values, [offset, factors], gradient)
    slopes = search._slopes(slice(0, ROWS), gradient.flatten(1), *search._grid())
    torch.testing.assert_close(slopes[0], by_offset)
    assert slopes[1] is not None
    torch.testing.assert_close(slopes[1], by_factors, rtol=1e-4, atol=1e-4)


def test_a_step_follows_the_signs_and_stays_within_half_a_step_and_the_bounds() -> None:
    scheme = Scheme(3, 8)
    start = round_to_nearest(_weight(), scheme, torch.float32)
    search = RoundingSearch(_weight(), start, widest=1.0, ranges=True)
    gradient = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    expected = search._slopes(slice(0, ROWS), gradient, *search._grid())
    search.descend(gradient, 0.125, 0.25)
    torch.testing.assert_close(search._offsets, -0.125 * expected[0].sign().flatten(1))
    assert expected[1] is not None
    torch.testing.assert_close(search._factors, (1 - 0.25 * expected[1].sign()).clamp(max=1.0))
    for _ in range(20):
        search.descend(gradient, 0.125, 0.25)
    assert float(search._offsets.abs().max()) == 0.5
    assert 0.1 <= float(search._factors.min()) < float(search._factors.max()) <= 1.0
    search.quantized().check_values()


def test_scaled_steps_are_gradients_over_their_own_root_mean_square() -> None:
    """Against the means written out, in float64."""
    scheme, generator = Scheme(8, 8), torch.Generator().manual_seed(1)
    start = round_to_nearest(_weight(), scheme, torch.float32)
    search = RoundingSearch(_weight(), start, widest=1.0, ranges=False, descent="scaled")
    slopes: list[torch.Tensor] = []
    expected = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    for step in range(1, 6):
        gradient = torch.randn(ROWS, COLUMNS, generator=generator)
        slopes.append(search._slopes(slice(0, ROWS), gradient, *search._grid())[0].flatten(1).double())
        shares = [0.01 * 0.99 ** (step - 1 - earlier) for earlier in range(step)]
        mean = sum(share * slope.square() for share, slope in zip(shares, slopes, strict=True)) / sum(shares)
        expected -= 0.01 * (slopes[-1] / torch.as_tensor(mean).sqrt().clamp(min=1e-30)).clamp(-3, 3)
        search.descend(gradient, 0.01, 0.0)
        torch.testing.assert_close(search._offsets.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("descent", ["sign", "scaled"])
def test_no_gradient_moves_nothing(descent: Descent) -> None:
    start = round_to_nearest(_weight(), Scheme(2, 8, symmetric=False), torch.bfloat16)
    search = RoundingSearch(_weight(), start, widest=2.0, ranges=True, descent=descent)
    for _ in range(3):
        search.descend(torch.zeros(ROWS, COLUMNS), 0.5, 0.5)
    assert _same(search.quantized(), start)


def test_a_group_of_zeros_stays_zeros() -> None:
    weight = _weight()
    weight[:, :8] = 0
    start = round_to_nearest(weight, Scheme(2, 8), torch.float16)
    search = RoundingSearch(weight, start, widest=2.0, ranges=True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        search.descend(torch.randn(ROWS, COLUMNS, generator=generator), 0.25, 0.25)
    assert not bool(search.quantized().dequantize()[:, :8].any())


@pytest.mark.parametrize("descent", ["sign", "scaled"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zeros_that_begin_as_zero_stay_so_whatever_the_gradients(scheme: Scheme, descent: Descent) -> None:
    pruned = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)) < 0.5
    weight = _weight().masked_fill(pruned, 0)
    start = round_to_nearest(weight, scheme, torch.float16, search=ClipSearch(signed=True))
    search = RoundingSearch(weight, start, widest=2.0, ranges=True, descent=descent)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        # Mostly to one side, so that offsets get as far as they may.
        search.descend(torch.rand(ROWS, COLUMNS, generator=generator) - 0.1, 0.25, 0.05)
        assert not bool(search.quantized().dequantize()[pruned].any())
    assert not _same(search.quantized(), start)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_whatever_the_gradients_the_result_can_be_stored(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(5)
    for start in _starts(scheme, torch.float16):
        search = RoundingSearch(_weight(), start, widest=2.0, ranges=True)
        for _ in range(30):
            search.descend(torch.randn(ROWS, COLUMNS, generator=generator), 0.5, 0.5)
        search.quantized().check_values()


def test_ranges_may_be_left_alone() -> None:
    start = round_to_nearest(_weight(), Scheme(2, 8), torch.float32)
    search = RoundingSearch(_weight(), start, widest=2.0, ranges=False)
    search.descend(torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)), 0.5, 0.5)
    found = search.quantized()
    assert torch.equal(found.scale, start.scale)
    assert not torch.equal(found.q, start.q)
