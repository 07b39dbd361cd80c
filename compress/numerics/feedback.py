"""Rounding a matrix so that the output of its layer changes least: error feedback and refinement.

Everything here minimises ``tr((W - V) H (W - V)^T)`` over the matrices ``V`` that a scheme can hold.
Matrices are worked on transposed, columns of the weight as contiguous rows, since every method walks
over the columns of all rows at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from compress.core.scheme import Scheme
from compress.numerics.affine import ClipSearch, Quantized, choose_scales, smallest_scale
from compress.numerics.grouping import group_width, row_chunks
from compress.numerics.hessian import FeedbackFactor, Hessian, Order
from compress.numerics.precision import full_precision

DEVICE_ELEMENTS = 1 << 26
"""Weights that are worked on at once on an accelerator, which wants many rows: 256 MiB a float32 copy."""
HOST_ROWS = 2048
"""Rows that are worked on at once on a CPU: enough that the walk over the columns costs little, few enough
that the copies stay small beside the block that the weights belong to."""
WIDEST_BLOCK = 1024
"""Columns of the widest group whose full Hessian is used to search its range; wider ones use its diagonal,
because the search costs rows x columns x width for each candidate."""


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
        """How errors count among the candidates; see `numerics.affine.choose_scales`."""
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
    sweeps: int = 4,
    block: int = 128,
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
    importance = ranges.importance(hessian, scheme, factor.damping)
    scale, zero = choose_scales(weight, scheme, storage, search=ranges.search, importance=importance)
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


def working_rows(weight: torch.Tensor) -> Iterator[slice]:
    """Rows of a matrix ``[rows, columns]`` that are worked on together, where none depends on another."""
    host = weight.device.type == "cpu"
    return row_chunks(weight, HOST_ROWS * weight.shape[1] if host else DEVICE_ELEMENTS)


@dataclass(frozen=True)
class _Grid:
    """Levels of a scheme, transposed: ``step`` and ``zero`` are float32 ``[groups, rows]``."""

    step: torch.Tensor
    zero: torch.Tensor | None
    lowest: int
    highest: int
    width: int
    storage: torch.dtype

    @classmethod
    def of(
        cls, scale: torch.Tensor, zero: torch.Tensor | None, scheme: Scheme, columns: int, rows: slice
    ) -> "_Grid":
        return cls(
            scale[rows].float().T.contiguous(),
            None if zero is None else zero[rows].float().T.contiguous(),
            scheme.lowest,
            scheme.highest,
            group_width(columns, scheme),
            scale.dtype,
        )

    def columns_to_groups(self, columns: torch.Tensor) -> list[int]:
        """The group of each column."""
        groups: list[int] = (columns // self.width).tolist()
        return groups

    def nearest(self, target: torch.Tensor, group: int) -> torch.Tensor:
        """The nearest integers, as floats; ``target`` is ``[rows]``, a column of the group."""
        levels = torch.div(target, self.step[group]).round_()
        if self.zero is not None:
            levels.add_(self.zero[group])
        return levels.clamp_(self.lowest, self.highest)

    def emptied(self, levels: torch.Tensor, held: torch.Tensor, group: int) -> torch.Tensor:
        """Integers of one column, ``[rows]``, with those that are held, bool ``[rows]``, meaning zero."""
        return levels.masked_fill_(held, 0) if self.zero is None else levels.where(~held, self.zero[group])

    def values(self, levels: torch.Tensor, group: int | torch.Tensor) -> torch.Tensor:
        """What a loader makes of the integers, rounded to the storage dtype.

        ``levels`` is ``[..., rows]``, of one group; or ``[columns, rows]`` with the group of each column.
        """
        offset = levels if self.zero is None else levels - self.zero[group]
        value = offset * self.step[group]
        return value if self.storage == torch.float32 else value.to(self.storage).float()


def round_with_feedback(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    scheme: Scheme,
    factor: FeedbackFactor,
    block: int = 128,
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
            grid = _Grid.of(scale, zero, scheme, weight.shape[1], rows)
            q[rows] = _fed_back(weight[rows], grid, factor, block, keep_zeros)
    return Quantized(q, scale, zero, scheme)


def _fed_back(
    weight: torch.Tensor, grid: _Grid, factor: FeedbackFactor, block: int, keep_zeros: bool
) -> torch.Tensor:
    """The integers of some rows, int8 ``[rows, columns]``."""
    columns = weight.shape[1]
    groups = grid.columns_to_groups(factor.order)
    # Places that are done hold their errors, the others still their weights.
    state = weight.T[factor.order]
    held = _zeros(state) if keep_zeros else None
    levels = torch.empty(state.shape, dtype=torch.int8, device=weight.device)
    for stop in range(columns, 0, -block):
        begin = max(0, stop - block)
        target = torch.addmm(state[begin:stop], factor.unit[stop:, begin:stop].T, state[stop:])
        inner = factor.unit[begin:stop, begin:stop].T.contiguous()
        for place in range(stop - 1, begin - 1, -1):
            local, group = place - begin, groups[place]
            aim = torch.addmv(target[local], state[place + 1 : stop].T, inner[local, local + 1 :])
            chosen = grid.nearest(aim, group)
            if held is not None:
                chosen = grid.emptied(chosen, held[place], group)
            levels[place] = chosen
            state[place].sub_(grid.values(chosen, group))
    q = torch.empty_like(levels)
    q[factor.order] = levels
    return q.T


def _zeros(matrix: torch.Tensor) -> torch.Tensor | None:
    """Where a matrix is zero; ``None`` where it is nowhere, as in most models that were not pruned."""
    zeros = matrix == 0
    return zeros.contiguous() if bool(zeros.any()) else None


def refine(
    weight: torch.Tensor,
    start: Quantized,
    hessian: Hessian,
    *,
    damping: float,
    sweeps: int,
    scales: bool = True,
    block: int = 128,
    keep_zeros: bool = False,
) -> Quantized:
    """Lower the error of a solution by coordinate descent over its scales and integers.

    One sweep re-fits every scale in closed form with the integers held (Lee et al. 2026, "Two-Stage Grid
    Optimization for Group-wise Quantization of LLMs", arXiv 2602.02126) and then moves every integer to
    its best value with all others held (Behdin et al. 2023, "QuantEase", arXiv 2309.01885). No step
    raises the damped error.

    Args:
        weight: float32 ``[rows, columns]``; not changed.
        start: the solution to begin with.
        hessian: of the layer's input.
        damping: added to the diagonal, relative to its mean; keeps the solution near the weights in
            directions that the calibration data hardly show.
        sweeps: passes over all columns; 0 returns ``start``.
        scales: whether scales are re-fitted too.
        block: columns that share one large product.
        keep_zeros: whether integers of weights that are zero stay where they are.
    """
    if sweeps == 0:
        return start
    q, scale = torch.empty_like(start.q), torch.empty_like(start.scale)
    ridge = damping * hessian.mean_diagonal
    with full_precision():
        for rows in working_rows(weight):
            grid = _Grid.of(start.scale, start.zero, start.scheme, start.columns, rows)
            held = _zeros(weight[rows].T) if keep_zeros else None
            descent = _Descent(weight[rows], start.q[rows], grid, hessian.matrix, ridge, held)
            for _ in range(sweeps):
                if scales:
                    descent.fit_scales()
                descent.move_integers(block)
            q[rows] = descent.levels.T
            scale[rows] = grid.step.T
    return replace(start, q=q, scale=scale)


class _Descent:
    """The state of a coordinate descent over some rows; all matrices are ``[columns, rows]``.

    Integers are kept in int8 and are floats only while some columns are worked on. Those that are ``held``
    do not move.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        q: torch.Tensor,
        grid: _Grid,
        hessian: torch.Tensor,
        ridge: float,
        held: torch.Tensor | None,
    ) -> None:
        self.grid = grid
        self._held = held
        self.levels = q.T.contiguous()
        self._hessian = hessian
        self._ridge = ridge
        self._groups = torch.arange(weight.shape[1], device=weight.device) // grid.width
        self._error = weight.T.clone(memory_format=torch.contiguous_format)
        for group in range(grid.step.shape[0]):
            part = self._part(group)
            self._error[part] -= grid.values(self.levels[part].float(), group)

    def _part(self, group: int) -> slice:
        return slice(group * self.grid.width, (group + 1) * self.grid.width)

    def _slope(self, part: slice) -> torch.Tensor:
        """Half the negative gradient with respect to the values of some columns."""
        return torch.addmm(self._error[part], self._hessian[part], self._error, beta=self._ridge)

    def _bent(self, part: slice, change: torch.Tensor) -> torch.Tensor:
        """The damped Hessian of some columns times a change of their values."""
        return torch.addmm(change, self._hessian[part, part], change, beta=self._ridge)

    def fit_scales(self) -> None:
        """Give every group the scale that is best for its integers, where that lowers the error."""
        smallest = smallest_scale(self.grid.storage)
        for group in range(self.grid.step.shape[0]):
            part = self._part(group)
            slope, levels = self._slope(part), self.levels[part].float()
            offset = levels if self.grid.zero is None else levels - self.grid.zero[group]
            gain = (slope * offset).sum(0)
            cost = (self._bent(part, offset) * offset).sum(0)
            step = self.grid.step[group].clone()
            fitted = (step + gain / cost).to(self.grid.storage).float()
            # A group whose integers are all zero has no best scale, and a scale must not vanish.
            usable = torch.isfinite(fitted) & (fitted.abs() >= smallest)
            before = self.grid.values(levels, group)
            self.grid.step[group] = torch.where(usable, fitted, step)
            moved = before - self.grid.values(levels, group)
            better = (moved * (2 * slope + self._bent(part, moved))).sum(0) < 0
            self.grid.step[group] = torch.where(better, self.grid.step[group], step)
            self._error[part] += torch.where(better, moved, 0)

    def move_integers(self, block: int) -> None:
        """Move every integer to its best value given all others, column after column."""
        columns = self.levels.shape[0]
        for begin in range(0, columns, block):
            part = slice(begin, min(begin + block, columns))
            slope = self._slope(part)
            curvature = self._hessian[part, part].clone()
            # A column without data and without damping has no curvature, and any value serves it.
            pivots = curvature.diagonal().add_(self._ridge).clamp(min=2.0**-126).tolist()
            groups = self._groups[part]
            levels = self.levels[part].float()
            values = self.grid.values(levels, groups)
            moved = torch.zeros_like(slope)
            for local, group in enumerate(groups.tolist()):
                value = values[local]
                steepness = torch.addmv(slope[local], moved[:local].T, curvature[local, :local])
                wish = steepness.div_(pivots[local])
                chosen = self.grid.nearest(value + wish, group)
                change = value - self.grid.values(chosen, group)
                # Whether the new value is nearer to the wish: |change + wish| < |wish|.
                better = torch.add(change, wish, alpha=2).mul_(change) < 0
                if self._held is not None:
                    better &= ~self._held[begin + local]
                torch.where(better, chosen, levels[local], out=levels[local])
                torch.mul(change, better, out=moved[local])
            self.levels[part] = levels
            self._error[part] += moved


def output_error(weight: torch.Tensor, quantized: Quantized, hessian: Hessian) -> float:
    """Squared error of the layer's output relative to its squared output, over the calibration data.

    ``tr((W - V) H (W - V)^T) / tr(W H W^T)``; 0 where the output is zero.
    """
    lost, total = 0.0, 0.0
    with full_precision():
        for rows in row_chunks(weight):
            original = weight[rows].float()
            error = original - quantized.rows(rows.start, rows.stop).dequantize().float()
            lost += float(((error @ hessian.matrix) * error).sum(dtype=torch.float64))
            total += float(((original @ hessian.matrix) * original).sum(dtype=torch.float64))
    return lost / total if total > 0 else 0.0
