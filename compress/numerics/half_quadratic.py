"""Half-quadratic quantization: the grid of least error in a norm that forgives outliers, without data.

For each group the sum of ``|w - (q - z) s|^p`` with ``p < 1`` is made small by splitting off the errors
(Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models",
https://mobiusml.github.io/hqq_blog). Two steps take turns: what counts as an outlier is taken out by the
generalised soft threshold ``e = sign(r) max(|r| - |r|^(p-1) / beta, 0)`` of the errors ``r``, and the
grid is fitted to the rest in closed form, while ``beta`` grows.

Ours differs from the original where a grid has to be one that readers take:

- a zero point is an integer of the range and a scale has the precision in which it is stored, where the
  original keeps both as they come (its zero point is a real number in 16 bits). So a fit ends at numbers
  that can be stored, and the error is that of the values which a loader will see;
- the original holds the scale and moves the zero point alone. A whole zero point hardly ever moves under
  such steps, so here the regression of the weights on their integers gives both, the zero point is
  rounded, and the scale is fitted again to it. A symmetric scheme has the scale alone;
- errors are measured in steps of the grid before the threshold, so that ``beta`` means the same for every
  group. On the raw weights of a language model, which are small, the threshold of the original takes
  every error for noise, and none for an outlier;
- it may begin more than once, and a group keeps the best grid that was met, the first ones among them, by
  its squared error. The original stops when the mean of the errors over the whole matrix grows. By the norm
  itself, a group at 2 bits gives its largest weights up, which a model does not forgive: the output's error
  grows with squares.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compress.core.scheme import Scheme
from compress.numerics.affine import Quantized, quantize
from compress.numerics.grouping import grouped, row_chunks
from compress.numerics.representable import stored_scales


@dataclass(frozen=True)
class HalfQuadratic:
    """How the two steps take turns.

    Attributes:
        norm: the exponent ``p`` of the error, in (0, 1].
        beta: weight of the split at the beginning, for errors in steps of the grid: one above
            ``beta ** (1 / (p - 2))`` steps is an outlier.
        growth: factor of ``beta`` from turn to turn.
        turns: how often both steps are taken.
    """

    norm: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    turns: int = 20


def fit(weight: torch.Tensor, starts: Sequence[Quantized], settings: HalfQuadratic) -> Quantized:
    """The best grids that half-quadratic splitting finds from some beginnings.

    Args:
        weight: float32 ``[rows, columns]``; not changed.
        starts: solutions to begin with, of one scheme; at least one.

    Returns:
        in each group the best that was met; no group's squared error is larger than that of any start.
    """
    first = starts[0]
    q, scale = first.q.clone(), first.scale.clone()
    zero = None if first.zero is None else first.zero.clone()
    for rows in row_chunks(weight):
        best = _fitted(
            weight[rows].float(), [start.rows(rows.start, rows.stop) for start in starts], settings
        )
        q[rows], scale[rows] = best.q, best.scale
        if zero is not None and best.zero is not None:
            zero[rows] = best.zero
    return Quantized(q, scale, zero, first.scheme)


def _fitted(weight: torch.Tensor, starts: Sequence[Quantized], settings: HalfQuadratic) -> Quantized:
    best = starts[0]
    least = group_errors(weight, best)
    for start in starts:
        current, beta = start, settings.beta
        for turn in range(settings.turns + 1):
            if turn:
                current = _turn(weight, current, settings.norm, beta)
                beta *= settings.growth
            error = group_errors(weight, current)
            best = _better(current, best, error < least)
            least = torch.minimum(error, least)
    return best


def group_errors(weight: torch.Tensor, quantized: Quantized) -> torch.Tensor:
    """The squared error of each group, ``[rows, groups]``; values are those that a loader sees."""
    errors = weight.float() - quantized.dequantize().float()
    return grouped(errors, quantized.scheme).square_().sum(-1)


def shrink(errors: torch.Tensor, beta: float, norm: float) -> torch.Tensor:
    """The generalised soft threshold: large errors stay nearly as they are, small ones become zero."""
    size = errors.abs()
    # At zero the power has no value, and nothing is left in any case.
    kept = (size - size.clamp(min=1e-12).pow(norm - 1) / beta).clamp_(min=0)
    return torch.copysign(kept, errors)


def _turn(weight: torch.Tensor, current: Quantized, norm: float, beta: float) -> Quantized:
    """Split the outliers off, fit the grid to the rest, and round to it."""
    scheme, step = current.scheme, current.scale.float().unsqueeze(-1)
    values, levels = grouped(weight, scheme), grouped(current.q.float(), scheme)
    offset = 0.0 if current.zero is None else current.zero.float().unsqueeze(-1)
    outliers = shrink(values / step - (levels - offset), beta, norm) * step
    target = values - outliers
    zero = None
    if current.zero is not None:
        zero = _fitted_zero(target, levels, current, scheme)
        levels = levels - zero.float().unsqueeze(-1)
    wish = (target * levels).sum(-1) / levels.square().sum(-1)
    scale = stored_scales(wish, current.scale, scheme)
    return Quantized(quantize(weight, scale, zero, scheme), scale, zero, scheme)


def _fitted_zero(
    target: torch.Tensor, levels: torch.Tensor, current: Quantized, scheme: Scheme
) -> torch.Tensor:
    """The whole number nearest to the zero point of the regression of values on integers, within bounds."""
    mean, centre = levels.mean(-1), target.mean(-1)
    centred = levels - mean.unsqueeze(-1)
    slope = (target * centred).sum(-1) / centred.square().sum(-1)
    found = (mean - centre / slope).round()
    before = torch.zeros_like(mean) if current.zero is None else current.zero.float()
    # A group on one level has no slope, and one that slopes down would be turned over.
    usable = torch.isfinite(found) & (slope * current.scale.float() > 0)
    return torch.where(usable, found, before).clamp_(scheme.lowest, scheme.highest).to(torch.int8)


def _better(new: Quantized, old: Quantized, better: torch.Tensor) -> Quantized:
    """The groups of one solution where they are better, of the other elsewhere; ``better`` [rows, groups]."""
    scheme = old.scheme
    q = torch.where(better.unsqueeze(-1), grouped(new.q, scheme), grouped(old.q, scheme)).flatten(1)
    zero = None
    if new.zero is not None and old.zero is not None:
        zero = torch.where(better, new.zero, old.zero)
    return Quantized(q, torch.where(better, new.scale, old.scale), zero, scheme)
