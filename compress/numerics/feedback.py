"""Rounding a matrix so that the output of its layer changes least: error feedback and refinement.

Everything here minimises ``tr((W - V) H (W - V)^T)`` over the matrices ``V`` that a scheme can hold.
Matrices are worked on transposed, columns of the weight as contiguous rows, since every method walks
over the columns of all rows at once.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from compress.core.scheme import Scheme
from compress.numerics.affine import ClipSearch, Quantized, choose_scales
from compress.numerics.grid import Grid
from compress.numerics.grouping import working_rows
from compress.numerics.hessian import FeedbackFactor, Hessian, Order
from compress.numerics.precision import full_precision
from compress.numerics.refinement import refine, zeros_of

WIDEST_BLOCK = 1024
"""Columns of the widest group whose full Hessian is used to search its range; wider ones use its diagonal,
because the search costs rows x columns x width for each candidate."""
SEARCHED = 11
"""Shrink factors that are tried: few, because scales are fitted to their integers afterwards."""


@dataclass(frozen=True)
class Ranges:
    """How the range of a group is chosen before its integers are.

    Attributes:
        clip: ``none`` takes the extremes of a group, ``mse`` the range with the least squared error of the
            weights, ``hessian`` the one with the least error of the layer's output.
        signed: whether a searched range may have a negative scale (`ClipSearch.signed`).
    """

    clip: Literal["none", "mse", "hessian"] = "hessian"
    signed: bool = True

    @property
    def search(self) -> ClipSearch | None:
        """The candidates, for `numerics.affine.choose_scales`."""
        return None if self.clip == "none" else ClipSearch(signed=self.signed)

    def importance(self, hessian: Hessian, scheme: Scheme, damping: float) -> torch.Tensor | None:
        """How errors count that nothing makes up for; see `numerics.affine.choose_scales`."""
        if self.clip != "hessian":
            return None
        width = scheme.group_size or hessian.columns
        return hessian.blocks(width, damping) if width <= WIDEST_BLOCK else hessian.diagonal


@dataclass(frozen=True)
class Solution:
    """A matrix that was rounded with error feedback.

    Attributes:
        quantized: the integers with their scales.
        damping: what was added to the Hessian's diagonal, relative to its mean.
        dead_columns: how many columns were zero for every token.
    """

    quantized: Quantized
    damping: float
    dead_columns: int


def solve(
    weight: torch.Tensor,
    hessian: Hessian,
    scheme: Scheme,
    storage: torch.dtype,
    *,
    ranges: Ranges,
    damping: float,
    order: Order = "static",
    sweeps: int = 2,
    block: int = 32,
    keep_zeros: bool = False,
) -> Solution:
    """Choose ranges, round with error feedback, refine: all that follows from a Hessian.

    Args:
        weight: float32 ``[rows, columns]``; its dead columns are overwritten with zero, so that no range is
            spent on weights that do not matter.
        hessian: of the layer's input.
        scheme: bits, group, symmetry and range.
        storage: dtype of the scales.
        ranges: how the range of a group is chosen.
        damping: added to the Hessian's diagonal, relative to its mean; grows where it is too small.
        order: of the columns, `Hessian.factor`.
        sweeps: of `refine`.
        block: columns between two large updates.
        keep_zeros: whether weights that are zero stay zero.

    Raises:
        CalibrationError: no data reached the layer, or its Hessian cannot be used.
        ModelError: the weight holds NaN or infinite values.
    """
    factor = hessian.factor(damping, order)
    dead = hessian.dead
    weight[:, dead] = 0
    # The range is for the values that are rounded with feedback, whose errors no longer interact.
    importance = factor.importance if ranges.clip == "hessian" else None
    search = replace(ranges.search, points=SEARCHED) if ranges.search else None
    scale, zero = choose_scales(weight, scheme, storage, search=search, importance=importance)
    rounded = round_with_feedback(weight, scale, zero, scheme, factor, block, keep_zeros=keep_zeros)
    rounded = refine(
        weight,
        rounded,
        hessian,
        damping=factor.damping,
        sweeps=sweeps,
        block=block,
        keep_zeros=keep_zeros,
    )
    return Solution(rounded, factor.damping, int(dead.sum()))


def round_with_feedback(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    scheme: Scheme,
    factor: FeedbackFactor,
    block: int = 32,
    *,
    keep_zeros: bool = False,
) -> Quantized:
    """Round column after column, passing each column's error on to those that follow: GPTQ.

    Frantar et al. 2023, arXiv 2210.17323, algorithm 1, in the equivalent form of QuIP's LDLQ. Errors are
    those of the values that a loader will see. Rows do not depend on each other and are handled in
    chunks, so that the extra memory is bounded.

    Args:
        weight: float32 ``[rows, columns]``; not changed.
        scale: ``[rows, groups]`` in the storage dtype; groups are those of the original columns.
        zero: int8 ``[rows, groups]``, or ``None`` for a symmetric scheme.
        scheme: bits, group, symmetry and range.
        factor: of the damped Hessian, `Hessian.factor`.
        block: columns between two updates of all later targets. It changes the speed, and the result
            only within rounding.
        keep_zeros: whether weights that are zero stay zero, as those of a pruned matrix should: the error
            that reaches them goes on to the columns after them.
    """
    q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    with full_precision():
        for rows in working_rows(weight):
            grid = Grid.of(scale, zero, scheme, weight.shape[1], rows)
            q[rows] = _fed_back(weight[rows], grid, factor, block, keep_zeros)
    return Quantized(q, scale, zero, scheme)


def _fed_back(
    weight: torch.Tensor, grid: Grid, factor: FeedbackFactor, block: int, keep_zeros: bool
) -> torch.Tensor:
    """The integers of some rows, int8 ``[rows, columns]``."""
    columns = weight.shape[1]
    groups = grid.columns_to_groups(factor.order)
    # Places that are done hold their errors, the others still their weights.
    state = weight.T[factor.order]
    held = zeros_of(state) if keep_zeros else None
    levels = torch.empty(state.shape, dtype=torch.int8, device=weight.device)
    stored = torch.empty(state.shape[1], dtype=grid.storage, device=weight.device)
    for stop in range(columns, 0, -block):
        begin = max(0, stop - block)
        own = state[begin:stop]
        targets = torch.addmm(own, factor.unit[stop:, begin:stop].T, state[stop:]).unbind(0)
        # Places of the block that are not done yet count for nothing.
        inner = factor.unit[begin:stop, begin:stop].T.contiguous().triu_(1).unbind(0)
        found = torch.empty_like(own)
        integers, errors = found.unbind(0), own.unbind(0)
        for local in range(stop - begin - 1, -1, -1):
            group = groups[begin + local]
            aim = torch.addmv(targets[local], own.T, inner[local])
            chosen = grid.nearest(aim, group, integers[local])
            if held is not None:
                grid.emptied(chosen, held[begin + local], group)
            errors[local].sub_(grid.stored(chosen, group, stored))
        levels[begin:stop] = found
    q = torch.empty_like(levels)
    q[factor.order] = levels
    return q.T


def output_error(weight: torch.Tensor, quantized: Quantized, hessian: Hessian) -> float:
    """Squared error of the layer's output relative to its squared output, over the calibration data.

    ``tr((W - V) H (W - V)^T) / tr(W H W^T)``; 0 where the output is zero.
    """
    lost, total = 0.0, 0.0
    for rows in working_rows(weight):
        original = weight[rows].float()
        total += hessian.energy(original)
        lost += hessian.energy(original - quantized.rows(rows.start, rows.stop).dequantize().float())
    return lost / total if total > 0 else 0.0
