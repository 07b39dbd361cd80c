"""Rounding with a gradient, against the same written with autograd's own detach."""

import pytest
import torch

from compress.core.scheme import Scheme
from compress.numerics.affine import Quantized, choose_scales, quantize
from compress.numerics.straight_through import moved, rounded, within

SCHEMES = [Scheme(3, 8), Scheme(3, None), Scheme(4, 16, symmetric=False), Scheme(8, None)]


def drawn(scheme: Scheme, *, shrink: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(1)
    weight = torch.randn(6, 32)
    scale, zero = choose_scales(weight * shrink, scheme, torch.float32)
    scale[::2] *= -1
    return weight, scale, zero


def reference(
    latent: torch.Tensor,
    logarithm: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    scheme: Scheme,
) -> torch.Tensor:
    """Clamping has a gradient of its own; only rounding is passed by."""
    step = (scale * logarithm.exp()).repeat_interleave(latent.shape[1] // scale.shape[1], 1)
    offset = 0 if zero is None else zero.repeat_interleave(latent.shape[1] // scale.shape[1], 1)
    place = (latent / step + offset).clamp(scheme.lowest - 0.5, scheme.highest + 0.5)
    level = place.round().clamp(scheme.lowest, scheme.highest)
    return (place + (level - place).detach() - offset) * step


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_values_are_those_of_a_reader_and_gradients_go_straight_through(scheme: Scheme) -> None:
    # A range that is too small, so that some floats lie beyond it.
    weight, scale, zero = drawn(scheme, shrink=0.6)
    latent = weight.clone().requires_grad_()
    logarithm = (0.1 * torch.randn(scale.shape)).requires_grad_()
    value = rounded(latent, scale, zero, scheme, logarithm)
    stored = moved(scale, logarithm)
    seen = Quantized(quantize(weight, stored, zero, scheme), stored, zero, scheme).dequantize()
    assert torch.equal(value, seen)
    wish = torch.randn_like(weight)
    value.backward(wish)
    twin, other = weight.clone().requires_grad_(), logarithm.detach().clone().requires_grad_()
    expected = reference(twin, other, scale, zero, scheme)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    expected.backward(wish)
    torch.testing.assert_close(latent.grad, twin.grad)
    torch.testing.assert_close(logarithm.grad, other.grad, rtol=1e-4, atol=1e-4)
    assert latent.grad is not None
    assert bool((latent.grad == 0).any())


def test_scales_that_stay_have_no_gradient_and_do_not_move() -> None:
    weight, scale, zero = drawn(SCHEMES[0])
    latent = weight.requires_grad_()
    rounded(latent, scale.bfloat16(), zero, SCHEMES[0]).sum().backward()
    assert latent.grad is not None
    assert moved(scale, None) is scale
    assert torch.equal(moved(scale.bfloat16(), torch.zeros_like(scale)), scale.bfloat16())


def test_a_scale_is_stored_as_a_number_that_can_be_divided_by_and_keeps_its_sign() -> None:
    scale = torch.tensor([[0.5, -0.5]], dtype=torch.float16)
    for logarithm in (-1e3, 1e3):
        found = moved(scale, torch.full((1, 2), logarithm))
        assert found.dtype == torch.float16
        assert bool((torch.isfinite(found) & (found.sign() == scale.sign())).all())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_floats_are_brought_to_the_integers_and_no_further(scheme: Scheme) -> None:
    weight, scale, zero = drawn(scheme)
    nearest = quantize(weight, scale, zero, scheme)
    matrix = Quantized(nearest, scale, zero, scheme)
    kept = within(weight, matrix)
    assert torch.equal(quantize(kept, scale, zero, scheme), nearest)
    step = scale.abs().repeat_interleave(32 // scale.shape[1], 1)
    inside = (matrix.dequantize() - weight).abs() <= 0.49 * step
    torch.testing.assert_close(kept[inside], weight[inside])
    # Integers that were chosen with an eye on others are kept as well.
    shifted = (nearest + 1).clamp(scheme.lowest, scheme.highest)
    chosen = within(weight, Quantized(shifted, scale, zero, scheme))
    assert torch.equal(quantize(chosen, scale, zero, scheme), shifted)


def test_integers_that_are_trained_fit_their_inputs_better_than_the_nearest() -> None:
    """Inputs that depend on one another leave integers to choose from, as they do in every model."""
    scheme = Scheme(3, None)
    torch.manual_seed(3)
    weight, inputs = torch.randn(8, 32), torch.randn(64, 4) @ torch.randn(4, 32)
    scale, zero = choose_scales(weight, scheme, torch.float32)
    latent = weight.clone().requires_grad_()
    optimiser = torch.optim.Adam([latent], 0.02)
    errors = []
    for _ in range(200):
        error = (inputs @ (rounded(latent, scale, zero, scheme) - weight).T).square().mean()
        errors.append(float(error.detach()))
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
    assert min(errors) < 0.5 * errors[0]
