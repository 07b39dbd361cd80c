"""Half-quadratic splitting against the original's equations, and against every grid there is."""

import itertools

import pytest
import torch

from compress.core.scheme import Scheme
from compress.numerics.affine import ClipSearch, Quantized, quantize, round_to_nearest
from compress.numerics.half_quadratic import HalfQuadratic, _turn, fit, group_errors, shrink

SCHEMES = (
    Scheme(2, 8),
    Scheme(3, None, range="narrow"),
    Scheme(4, 16),
    Scheme(8, 8, symmetric=False),
    Scheme(2, 8, symmetric=False),
    Scheme(3, None, symmetric=False),
)


def _weight(rows: int = 12, columns: int = 32, seed: int = 0) -> torch.Tensor:
    """Heavy tails and a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * (1 + torch.rand(rows, columns, generator=generator).pow(8) * 6) + 0.2


def test_the_threshold_is_the_generalised_soft_one() -> None:
    for value, beta, norm in itertools.product(
        (-2.0, -0.3, -0.1, 0.05, 0.4, 1.0), (2.0, 10.0), (0.5, 0.7, 1.0)
    ):
        size = max(0.0, abs(value) - abs(value) ** (norm - 1) / beta)
        found = float(shrink(torch.tensor([value], dtype=torch.float64), beta, norm))
        assert found == pytest.approx(size if value > 0 else -size)
    assert float(shrink(torch.zeros(1), 10.0, 0.7)) == 0


def test_errors_are_summed_by_group_over_the_values_of_a_loader() -> None:
    weight, scheme = _weight(2, 16), Scheme(2, 8, symmetric=False)
    rounded = round_to_nearest(weight, scheme, torch.bfloat16)
    errors = group_errors(weight, rounded)
    value = rounded.dequantize().float()
    expected = [
        [
            sum(abs(float(weight[row, c] - value[row, c])) ** 2 for c in range(8 * g, 8 * g + 8))
            for g in (0, 1)
        ]
        for row in (0, 1)
    ]
    torch.testing.assert_close(errors, torch.tensor(expected))


def test_one_turn_is_the_threshold_and_a_regression() -> None:
    """Element by element in float64: outliers out, scale and zero by least squares, both made storable."""
    scheme = Scheme(3, None, symmetric=False)
    weight = _weight(6, 24)
    start = round_to_nearest(weight, scheme, torch.float32)
    turned = _turn(weight, start, 0.7, 10.0)
    assert turned.zero is not None
    assert start.zero is not None
    for row in range(6):
        w, q = weight[row].double(), start.q[row].double()
        s, z = float(start.scale[row, 0]), float(start.zero[row, 0])
        target = w - s * shrink(w / s - (q - z), 10.0, 0.7)
        design = torch.stack([q, torch.ones_like(q)], dim=1)
        slope, intercept = torch.linalg.lstsq(design, target.unsqueeze(1)).solution[:, 0].tolist()
        zero = min(max(round(-intercept / slope), scheme.lowest), scheme.highest)
        assert int(turned.zero[row, 0]) == zero
        scale = torch.linalg.lstsq((q - zero).unsqueeze(1), target.unsqueeze(1)).solution.item()
        assert float(turned.scale[row, 0]) == pytest.approx(scale, rel=1e-5)
    assert torch.equal(turned.q, quantize(weight, turned.scale, turned.zero, scheme))


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_group_is_worse_than_where_it_began(scheme: Scheme, storage: torch.dtype) -> None:
    weight = _weight()
    for norm in (0.5, 1.0):
        start = round_to_nearest(weight, scheme, storage)
        found = fit(weight, [start], HalfQuadratic(norm=norm))
        found.check_values()
        before, after = group_errors(weight, start), group_errors(weight, found)
        assert bool((after <= before).all())
        if scheme.bits < 4:
            assert float(after.sum()) < 0.97 * float(before.sum())


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_comes_close_to_the_best_of_all_grids(symmetric: bool) -> None:
    """Against every zero point and a fine net of scales, with the nearest integers for each."""
    scheme = Scheme(2, None, symmetric=symmetric)
    weight = _weight(16, 12)
    starts = [
        round_to_nearest(weight, scheme, torch.float32, search=search) for search in (None, ClipSearch())
    ]
    start, alone, found = (
        group_errors(weight, each)
        for each in (
            starts[0],
            fit(weight, starts[:1], HalfQuadratic()),
            fit(weight, starts, HalfQuadratic()),
        )
    )
    least = torch.full_like(start, torch.inf)
    zeros = [None] if symmetric else [torch.full((16, 1), z, dtype=torch.int8) for z in range(-2, 2)]
    widest = weight.abs().amax(1, keepdim=True)
    for share, zero in itertools.product(torch.linspace(0.02, 1.0, 120).tolist(), zeros):
        scale = widest * share
        grid = Quantized(quantize(weight, scale, zero, scheme), scale, zero, scheme)
        least = torch.minimum(least, group_errors(weight, grid))
    # How much of what can be gained is gained: from the extremes, and from searched ranges too.
    assert float((start - alone).sum()) > 0.4 * float((start - least).sum())
    assert float((start - found).sum()) > 0.8 * float((start - least).sum())


def test_a_group_of_zeros_or_of_one_value_stays_sound() -> None:
    weight = torch.zeros(3, 16)
    weight[1] = 0.5
    weight[2, :8] = -1.0
    for scheme in (Scheme(2, 8), Scheme(2, 8, symmetric=False)):
        found = fit(weight, [round_to_nearest(weight, scheme, torch.float16)], HalfQuadratic())
        found.check_values()
        torch.testing.assert_close(found.dequantize().float(), weight, atol=2e-3, rtol=0)


def test_several_beginnings_give_the_best_of_each_group() -> None:
    weight, scheme = _weight(), Scheme(3, 8)
    starts = [round_to_nearest(weight * factor, scheme, torch.float32) for factor in (1.0, 0.5)]
    together = group_errors(weight, fit(weight, starts, HalfQuadratic()))
    alone = [group_errors(weight, fit(weight, [start], HalfQuadratic())) for start in starts]
    assert torch.equal(together, torch.minimum(*alone))
