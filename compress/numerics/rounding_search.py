"""Learning how to round one matrix from the gradient of whatever its values lead to.

A weight is rounded as ``q = clamp(round(w / s + v) + z)`` with an offset ``v`` in [-1/2, 1/2] of its own,
and the range of each group is shrunk or stretched by factors; offsets and factors follow the *sign* of
their gradient, through the rounding as if it were not there (Cheng et al. 2023, "Optimize Weight Rounding
via Signed Gradient Descent for the Quantization of LLMs", arXiv 2309.05516, equations 3 to 7).

Ours differs in where it may begin. The paper begins at the extremes of each group, rounded to nearest.
Here the beginning is any solution, such as one of error feedback, whose integers may lie further from the
weights than half a step: such a weight counts as the nearest value that does round to its integer. So
offsets of zero and factors of one are that solution exactly, and from there every integer may go either
way. Only a weight of zero that begins as zero stays so, as a pruned one should: it lies at zero in every
grid, and the half step that it may go rounds to even.

The state is not a graph of autograd: the gradient of a loss with respect to the *values* of the matrix comes
in, and what follows from it for offsets and factors is written out here. So the matrix costs two float32
copies (where the weights lie, and the offsets), and a third where steps are scaled (`Descent`).
"""

from typing import Literal, final

import torch

from compress.numerics.affine import Quantized
from compress.numerics.grouping import grouped, row_chunks
from compress.numerics.representable import stored_scales

Descent = Literal["sign", "scaled"]
"""How offsets follow their gradient: by its sign, as in the paper, or by its size relative to its own root
mean square so far. A weight that the loss keeps pulling both ways, which is one near its best place, then
hardly moves, where the sign would have it change its integer from step to step."""

_MEMORY = 0.99
"""Share of a mean square that stays from step to step."""
_LONGEST = 3.0
"""The largest scaled step, in rates."""
_FURTHEST = 0.5
"""The largest offset, in steps."""
_SMALLEST_FACTOR = 0.1
"""Below it a range holds hardly a weight; reached only with rates far above the default."""
_FROM_TIE = 1e-3
"""How far, in steps, a weight that was moved stays from where rounding would turn: far more than float32
loses in a division, and nothing beside an offset."""


@final
class RoundingSearch:
    """Offsets and factors of one matrix.

    Attributes:
        start: the solution to begin with; it is the state until the first step.

    Args:
        weight: float ``[rows, columns]``; not changed and not kept.
        start: integers, scales and zero points.
        widest: the largest factor of a range: 1 where the ranges of the start are the extremes of their
            groups, which no larger one can serve; more where they were searched.
        ranges: whether the factors are learned too.
        descent: how offsets follow their gradient; factors always follow its sign.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        start: Quantized,
        *,
        widest: float,
        ranges: bool,
        descent: Descent = "sign",
    ) -> None:
        self.start = start
        self._steps = 0
        self._squares = torch.zeros(weight.shape, device=weight.device) if descent == "scaled" else None
        self._widest = widest
        self._ranges = ranges
        # Of the low and the high end of a range; a symmetric one has a single factor.
        ends = 1 if start.scheme.symmetric else 2
        self._factors = torch.ones(ends, *start.scale.shape, device=weight.device)
        self._offsets = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        self._places = torch.empty_like(self._offsets)
        for rows in row_chunks(weight):
            self._places[rows] = self._placed(weight[rows].float(), rows)

    def quantized(self) -> Quantized:
        """The integers, scales and zero points of the present state, in tensors of their own."""
        scheme = self.start.scheme
        scale, zero = self._grid()
        q = torch.empty_like(self.start.q)
        for rows in row_chunks(self._places):
            levels = self._levels(rows, scale, zero)[0].clamp_(scheme.lowest, scheme.highest)
            q[rows] = levels.flatten(1).to(torch.int8)
        return Quantized(q, scale, None if zero is None else zero.to(torch.int8), scheme)

    def descend(self, gradient: torch.Tensor, rate: float, range_rate: float) -> None:
        """Take one step against the signs of the gradients.

        Args:
            gradient: of a loss with respect to the values of the matrix, ``[rows, columns]``.
            rate: how far offsets go, in steps of the grid.
            range_rate: how far factors go.
        """
        scale, zero = self._grid()
        self._steps += 1
        for rows in row_chunks(self._places):
            offsets, factors = self._slopes(rows, gradient[rows].float(), scale, zero)
            self._offsets[rows] -= rate * self._direction(offsets.flatten(1), rows)
            self._offsets[rows].clamp_(-_FURTHEST, _FURTHEST)
            if factors is not None:
                self._factors[:, rows] -= range_rate * factors.sign_()
                self._factors[:, rows].clamp_(_SMALLEST_FACTOR, self._widest)

    def _direction(self, slopes: torch.Tensor, rows: slice) -> torch.Tensor:
        """Where offsets go, in rates, before the minus sign; the slopes are used up."""
        if self._squares is None:
            return slopes.sign_()
        squares = self._squares[rows]
        squares.mul_(_MEMORY).addcmul_(slopes, slopes, value=1 - _MEMORY)
        # The mean over the steps so far, not over steps before the first.
        root = (squares / (1 - _MEMORY**self._steps)).sqrt_().clamp_(min=torch.finfo(squares.dtype).tiny)
        return slopes.div_(root).clamp_(-_LONGEST, _LONGEST)

    def _placed(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        """Where weights lie in steps of the first grid, moved to where they round to the first integers."""
        start, scheme = self.start.rows(rows.start, rows.stop), self.start.scheme
        places = grouped(weight, scheme) / start.scale.float().unsqueeze(-1)
        levels = grouped(start.q.float(), scheme)
        offset = 0.0 if start.zero is None else start.zero.float().unsqueeze(-1)
        within = _FURTHEST - _FROM_TIE
        # What lies beyond the range is held by its end all the same.
        low = torch.where(levels == scheme.lowest, -torch.inf, levels - within) - offset
        high = torch.where(levels == scheme.highest, torch.inf, levels + within) - offset
        return torch.minimum(torch.maximum(places, low), high).flatten(1)

    def _grid(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales in their storage dtype and zero points as float32, both ``[rows, groups]``."""
        first, scheme = self.start.scale.float(), self.start.scheme
        if self.start.zero is None:
            return stored_scales(first * self._factors[0], self.start.scale, scheme), None
        low, high = self._ends()
        scale = stored_scales(first * ((low + high) / scheme.steps), self.start.scale, scheme)
        return scale, (scheme.lowest + (low * first / scale.float()).round_()).clamp_(max=scheme.highest)

    def _ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """How many steps of the first grid lie below and above the value zero, factors applied."""
        zero, scheme = self.start.zero, self.start.scheme
        if zero is None:
            raise ValueError(f"{scheme} has one factor for both ends of its range")
        return self._factors[0] * (zero.float() - scheme.lowest), self._factors[1] * (
            scheme.highest - zero.float()
        )

    def _levels(
        self, rows: slice, scale: torch.Tensor, zero: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Integers before they are clamped, and the places of the weights in steps of the present grid."""
        stretch = (self.start.scale[rows].float() / scale[rows].float()).unsqueeze(-1)
        places = grouped(self._places[rows], self.start.scheme) * stretch
        levels = torch.add(places, grouped(self._offsets[rows], self.start.scheme)).round_()
        return (levels if zero is None else levels.add_(zero[rows].unsqueeze(-1))), places

    def _slopes(
        self, rows: slice, gradient: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Slopes by the offsets ``[rows, groups, width]`` and by the factors ``[ends, rows, groups]``.

        With the rounding taken for the identity, a value ``(q - z) s`` inside the range moves with its
        offset by ``s``, and with the scale by how far its integer is from the weight; one that is held by
        an end of the range does not move with its offset, and moves with scale and zero point as they do.
        """
        scheme = self.start.scheme
        levels, places = self._levels(rows, scale, zero)
        inside = (levels >= scheme.lowest) & (levels <= scheme.highest)
        slope = grouped(gradient, scheme)
        step = scale[rows].float()
        offsets = slope * step.unsqueeze(-1) * inside
        if not self._ranges:
            return offsets, None
        levels.clamp_(scheme.lowest, scheme.highest)
        if zero is not None:
            levels.sub_(zero[rows].unsqueeze(-1))
        by_scale = (slope * levels.sub_(places.mul_(inside))).sum(-1)
        first = self.start.scale[rows].float()
        if self.start.zero is None:
            return offsets, (by_scale * first).unsqueeze(0)
        by_zero = -step * (slope * ~inside).sum(-1)
        below = self.start.zero[rows].float() - scheme.lowest
        above = scheme.highest - self.start.zero[rows].float()
        # The zero point is `lowest + low * below * first / step`, and step depends on both factors.
        spread = first / step
        bent = -self._factors[0, rows] * below * spread / step
        scale_by = torch.stack([below, above]) * (first / scheme.steps)
        zero_by = scale_by * bent
        zero_by[0] += below * spread
        return offsets, by_scale * scale_by + by_zero * zero_by
