"""Lowering the output error of a rounded layer by coordinate descent over its scales and integers.

One sweep re-fits every scale in closed form with the integers held (Lee et al. 2026, "Two-Stage Grid
Optimization for Group-wise Quantization of LLMs", arXiv 2602.02126) and moves every integer to its best
value with all others held (Behdin et al. 2023, "QuantEase", arXiv 2309.01885). Nearly all of its time goes
into the slopes of the error, one product with the whole Hessian; so the scales and the integers of some
columns share one, which is carried on through every step.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import final

import torch

from compress.numerics.affine import Quantized, smallest_scale
from compress.numerics.grid import Grid
from compress.numerics.grouping import working_rows
from compress.numerics.hessian import Hessian
from compress.numerics.precision import full_precision

_PART = 128
"""Columns whose slopes come from one product with the Hessian, where the groups are narrower."""


def refine(
    weight: torch.Tensor,
    start: Quantized,
    hessian: Hessian,
    *,
    damping: float,
    sweeps: int,
    scales: bool = True,
    block: int = 32,
    keep_zeros: bool = False,
) -> Quantized:
    """Lower the error of a solution; no step raises the damped error.

    Args:
        weight: float32 ``[rows, columns]``; not changed.
        start: the solution to begin with.
        hessian: of the layer's input.
        damping: added to the diagonal, relative to its mean; keeps the solution near the weights in
            directions that the calibration data hardly show.
        sweeps: passes over all columns; 0 returns ``start``.
        scales: whether scales are re-fitted too.
        block: columns that are moved between two updates of the slopes of those after them. It changes the
            speed, and the result only within rounding.
        keep_zeros: whether integers of weights that are zero stay where they are.
    """
    if sweeps == 0:
        return start
    q, scale = torch.empty_like(start.q), torch.empty_like(start.scale)
    ridge = damping * hessian.mean_diagonal
    with full_precision():
        for rows in working_rows(weight):
            grid = Grid.of(start.scale, start.zero, start.scheme, start.columns, rows)
            held = zeros_of(weight[rows].T) if keep_zeros else None
            descent = _Descent(weight[rows], start.q[rows], grid, hessian.matrix, ridge, held)
            for _ in range(sweeps):
                descent.sweep(block, scales)
            q[rows] = descent.levels.T
            scale[rows] = grid.step.T
    return replace(start, q=q, scale=scale)


def zeros_of(matrix: torch.Tensor) -> torch.Tensor | None:
    """Where a matrix is zero; ``None`` where it is nowhere, as in most models that were not pruned."""
    zeros = matrix == 0
    return zeros.contiguous() if bool(zeros.any()) else None


@final
class _Descent:
    """The state of a coordinate descent over some rows; all matrices are ``[columns, rows]``.

    Integers are kept in int8 and are floats only while some columns are worked on. Those that are ``held``
    do not move. A *slope* is half the negative gradient of the damped error with respect to the values of
    some columns: the damped Hessian times the error.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        q: torch.Tensor,
        grid: Grid,
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
            part = slice(group * grid.width, (group + 1) * grid.width)
            self._error[part] -= grid.values(self.levels[part].float(), group)

    def sweep(self, block: int, scales: bool) -> None:
        """Fit the scales of a few whole groups, then move their integers, and so on to the last column."""
        for part in self._parts():
            slope = torch.addmm(self._error[part], self._hessian[part], self._error, beta=self._ridge)
            if scales:
                self._fit_scales(part, slope)
            self._move_integers(part, slope, block)

    def _parts(self) -> Iterator[slice]:
        columns, width = self._error.shape[0], self.grid.width
        step = width * max(1, _PART // width)
        for begin in range(0, columns, step):
            yield slice(begin, min(begin + step, columns))

    def _fit_scales(self, part: slice, slope: torch.Tensor) -> None:
        """Give the groups of a part the scales that are best for their integers, where that is better.

        The slope of the part is kept what it is for.
        """
        width, smallest = self.grid.width, smallest_scale(self.grid.storage)
        for begin in range(part.start, part.stop, width):
            group, own = begin // width, slice(begin, begin + width)
            inner = slice(begin - part.start, begin - part.start + width)
            step = self.grid.step[group].clone()
            levels = self.levels[own].float()
            offset = levels if self.grid.zero is None else levels - self.grid.zero[group]
            gain = (slope[inner] * offset).sum(0)
            bent = torch.addmm(offset, self._hessian[own, own], offset, beta=self._ridge)
            fitted = (step + gain / bent.mul_(offset).sum(0)).to(self.grid.storage).float()
            # A group whose integers are all zero has no best scale, and a scale must not vanish.
            usable = torch.isfinite(fitted) & (fitted.abs() >= smallest)
            before = self.grid.values(levels, group)
            self.grid.step[group] = torch.where(usable, fitted, step)
            moved = before.sub_(self.grid.values(levels, group))
            change = self._hessian[part, own] @ moved
            change[inner].add_(moved, alpha=self._ridge)
            better = torch.add(change[inner], slope[inner], alpha=2).mul_(moved).sum(0) < 0
            self.grid.step[group] = torch.where(better, self.grid.step[group], step)
            self._error[own].add_(moved.masked_fill_(~better, 0))
            slope.add_(change.masked_fill_(~better, 0))

    def _move_integers(self, part: slice, slope: torch.Tensor, block: int) -> None:
        """Move every integer of a part to its best value given all others, column after column."""
        for begin in range(part.start, part.stop, block):
            own = slice(begin, min(begin + block, part.stop))
            inner = slice(own.start - part.start, own.stop - part.start)
            moved = self._moved(own, slope[inner])
            self._error[own].add_(moved)
            if own.stop < part.stop:
                slope[inner.stop :].addmm_(self._hessian[own.stop : part.stop, own], moved)

    def _moved(self, own: slice, slope: torch.Tensor) -> torch.Tensor:
        """Move the integers of some columns; returns how much smaller their values are now."""
        curvature = self._hessian[own, own].clone()
        # A column without data and without damping has no curvature, and any value serves it.
        pivots = curvature.diagonal().add_(self._ridge).clamp(min=2.0**-126).unsqueeze(1)
        influence, wishes = curvature.div_(pivots).unbind(0), (slope / pivots).unbind(0)
        groups = self._groups[own]
        levels = self.levels[own].float()
        values = self.grid.values(levels, groups)
        moved, found = torch.zeros_like(values), torch.empty_like(values)
        befores, changes, integers = values.unbind(0), moved.unbind(0), found.unbind(0)
        stored = torch.empty(values.shape[1], dtype=self.grid.storage, device=values.device)
        nothing = values.new_zeros(())
        for local, group in enumerate(groups.tolist()):
            # Columns after this one have not moved yet.
            wish = torch.addmv(wishes[local], moved.T, influence[local])
            chosen = self.grid.nearest(befores[local] + wish, group, integers[local])
            change = befores[local] - self.grid.stored(chosen, group, stored)
            # Whether the new value is nearer to the wish: |change + wish| < |wish|.
            better = torch.add(change, wish, alpha=2).mul_(change) < 0
            if self._held is not None:
                better &= ~self._held[own.start + local]
            torch.where(better, change, nothing, out=changes[local])
        self.levels[own] = torch.where(moved == 0, levels, found)
        return moved
