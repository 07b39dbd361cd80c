"""Rounding that lets a gradient through, so that integers can be trained.

A rounded weight is a step function of the float behind it, and the gradient of a step is zero. The
straight-through estimator takes the gradient in the rounded weight for that in the float (Bengio, Léonard and
Courville 2013, "Estimating or Propagating Gradients Through Stochastic Neurons", arXiv 1308.3432, section 4),
inside the range of the integers: beyond it the float may move without a change, and has no gradient.

A step of the grid is learned by its logarithm, so that the learning rate is a relative one and a step keeps
its sign. Its gradient is that of "Learned Step Size Quantization" (Esser et al. 2020, arXiv 1902.08153,
equation 3): for a weight inside the range ``d value / d step = (q - zero) - w / step``, beyond it
``q - zero``.
"""

from typing import Any

import torch

from compress.core.scheme import Scheme
from compress.numerics.affine import Quantized, quantize, smallest_scale
from compress.numerics.grouping import grouped

INSIDE = 0.499
"""How far, in steps, a float may be from its integer and be rounded to it whatever the arithmetic does."""


def moved(scale: torch.Tensor, logarithm: torch.Tensor | None) -> torch.Tensor:
    """Scales times ``exp(logarithm)``, in the dtype in which they are stored; finite and never zero.

    Args:
        scale: ``[rows, groups]`` in its storage dtype.
        logarithm: float ``[rows, groups]``; ``None`` leaves them.
    """
    if logarithm is None:
        return scale
    least, most = smallest_scale(scale.dtype), torch.finfo(scale.dtype).max / 256
    size = (scale.float().abs() * logarithm.detach().float().exp()).clamp(least, most)
    return torch.where(logarithm == 0, scale, size.copysign(scale.float()).to(scale.dtype))


def rounded(
    latent: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    scheme: Scheme,
    logarithm: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weights that a reader of the integers sees, with gradients in the floats and in the logarithms.

    Args:
        latent: float ``[rows, columns]``, the weights behind the integers.
        scale: ``[rows, groups]`` in its storage dtype, in which readers compute.
        zero: int8 ``[rows, groups]`` or ``None``.
        scheme: of the integers.
        logarithm: float ``[rows, groups]``, of what the scales are multiplied by; ``None`` where they stay.

    Returns:
        ``[rows, columns]`` in the dtype of `latent`: `Quantized.dequantize` of the nearest integers.
    """
    value: torch.Tensor = _Rounding.apply(latent, logarithm, scale, zero, scheme)  # type: ignore[no-untyped-call]
    return value


def within(latent: torch.Tensor, matrix: Quantized) -> torch.Tensor:
    """Floats brought so near to a matrix's integers that they are rounded to them: ``[rows, columns]``.

    Args:
        latent: floats from which the integers may come; one that is nearer to another integer goes to the
            edge of its own.
    """
    scale = matrix.scale.float().unsqueeze(-1)
    levels = grouped(matrix.q.float(), matrix.scheme)
    if matrix.zero is not None:
        levels = levels - matrix.zero.float().unsqueeze(-1)
    steps = grouped(latent.float(), matrix.scheme) / scale
    return (steps.clamp(levels - INSIDE, levels + INSIDE) * scale).flatten(1)


class _Rounding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        latent: torch.Tensor,
        logarithm: torch.Tensor | None,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        scheme: Scheme,
    ) -> torch.Tensor:
        stored = moved(scale, logarithm)
        q = quantize(latent, stored, zero, scheme)
        ctx.scheme, ctx.learns = scheme, logarithm is not None
        ctx.save_for_backward(latent, stored, zero, q)
        return Quantized(q, stored, zero, scheme).dequantize().to(latent.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        latent, stored, zero, q = ctx.saved_tensors
        scheme: Scheme = ctx.scheme
        scale = stored.to(latent.dtype).unsqueeze(-1)
        offset = 0.0 if zero is None else zero.to(latent.dtype).unsqueeze(-1)
        steps = grouped(latent, scheme) / scale
        place = steps + offset
        inside = (place >= scheme.lowest - 0.5) & (place <= scheme.highest + 0.5)
        gradient = grouped(gradients[0], scheme)
        of_latent = (gradient * inside).flatten(1)
        if not ctx.learns:
            return of_latent, None, None, None, None
        levels = grouped(q.to(latent.dtype), scheme) - offset
        slope = (levels - torch.where(inside, steps, 0.0)) * scale
        return of_latent, (gradient * slope).sum(-1), None, None, None
