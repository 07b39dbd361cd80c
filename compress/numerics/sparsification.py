"""Setting weights of a matrix to zero so that the output of its layer changes least: SparseGPT.

Everything here minimises ``tr((W - V) H (W - V)^T)`` over matrices ``V`` with zeros where a mask has them,
and the mask is chosen on the way (Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1). Columns are
visited from left to right. A weight that is pruned leaves an error, for which the weights of the columns
after it make up, and a weight that stays takes the value that it has by then. What goes is decided for a
block of columns at once, or for a run of an N:M pattern, when it is reached: the weights with the smallest
``w^2 / [U]_cc^2``, where ``U`` is the upper Cholesky factor of the inverse Hessian.

The walk is the one of `numerics.feedback`, with the factor of the Hessian itself in place of that of its
inverse (`numerics.hessian.FeedbackFactor`): ``1 / [U]_cc^2`` is the pivot of a column.

The walk never goes back: a column's weights do not know what is pruned after them. So the weights that stay
are fitted once more to the finished mask, all of them together, by conjugate gradients on the normal
equations of each row. That is the ordinary least-squares problem, which `refit` approaches from the values
of the walk without ever raising the error; it costs one product with the Hessian a step.
"""

from dataclasses import dataclass

import torch

from compress.numerics.grouping import working_rows
from compress.numerics.hessian import FeedbackFactor, Hessian
from compress.numerics.masks import lowest_mask, pattern_mask, whole
from compress.numerics.precision import full_precision

_NO_CURVATURE = 2.0**-126
"""Stands in for the curvature of a column without data and without damping: any value serves it."""


@dataclass(frozen=True)
class Sparsified:
    """A matrix of which weights were taken away and the others moved.

    Attributes:
        weight: float32 ``[rows, columns]``.
        damping: what was added to the Hessian's diagonal, relative to its mean.
        dead_columns: how many columns were zero for every token.
        output_error: squared error of the layer's output over the calibration data, relative to its squared
            output.
    """

    weight: torch.Tensor
    damping: float
    dead_columns: int
    output_error: float


def sparsify(
    weight: torch.Tensor,
    hessian: Hessian,
    *,
    sparsity: float = 0.5,
    pattern: tuple[int, int] | None = None,
    damping: float,
    block: int = 128,
    steps: int = 0,
) -> Sparsified:
    """Choose the weights that go and move the others.

    Args:
        weight: float32 ``[rows, columns]``; overwritten with the result.
        hessian: of the layer's input.
        sparsity: share of the weights that go, rounded down to whole ones: of each block of columns the same
            share, whatever their rows. Not looked at beside a pattern.
        pattern: N and M for at most N weights that are not zero among each M neighbours of a row.
        damping: added to the Hessian's diagonal, relative to its mean; grows where it is too small.
        block: columns whose zeros are chosen together; with a pattern it changes the speed alone.
        steps: of `refit`.

    Raises:
        CalibrationError: no data reached the layer, or its Hessian cannot be used.
        ValueError: the runs of the pattern do not divide the columns; plans refuse such layers earlier.
    """
    factor = hessian.factor(damping, "none")
    total = _output(weight, hessian)
    error = _walked(weight, hessian, factor, sparsity, pattern, block)
    refit(weight, error, hessian, damping=factor.damping, steps=steps)
    lost = _output(error, hessian)
    return Sparsified(weight, factor.damping, int(hessian.dead.sum()), lost / total if total > 0 else 0.0)


def _output(matrix: torch.Tensor, hessian: Hessian) -> float:
    """``tr(M H M^T)``: the squared output of a layer with these weights."""
    total = 0.0
    with full_precision():
        for rows in working_rows(matrix):
            part = matrix[rows]
            total += float(torch.mm(part, hessian.matrix).mul_(part).sum(dtype=torch.float64))
    return total


def _walked(
    weight: torch.Tensor,
    hessian: Hessian,
    factor: FeedbackFactor,
    sparsity: float,
    pattern: tuple[int, int] | None,
    block: int,
) -> torch.Tensor:
    """Prune column after column into ``weight``; returns what it was less what it is.

    Inside, matrices are transposed, ``[places, rows]``, with the places of the factor: they are walked from
    the last to the first as the columns are from the first to the last.
    """
    columns, of = weight.shape[1], 1 if pattern is None else pattern[1]
    if columns % of:
        raise ValueError(f"{columns} columns cannot be divided into runs of {of}")
    # A run is decided when its first column is reached, so the end of a block must not part it.
    block = -(-block // of) * of
    # An input that was always zero carries no error, whatever its unit diagonal and the damping say.
    costs = factor.pivots.masked_fill(hessian.dead[factor.order], 0.0).unsqueeze(1)
    # Places that are done hold their errors, the others still their weights.
    state = weight.T[factor.order]
    with full_precision():
        for stop in range(columns, 0, -block):
            begin = max(0, stop - block)
            target = torch.addmm(state[begin:stop], factor.unit[stop:, begin:stop].T, state[stop:])
            inner = factor.unit[begin:stop, begin:stop].T.contiguous()
            if pattern is None:
                done, then = columns - stop, columns - begin
                # Counted from the beginning, so that all blocks together lose the share of the whole.
                gone = whole(target.shape[1] * then, sparsity) - whole(target.shape[1] * done, sparsity)
                reached = _reached(state[begin:stop], target, inner)
                staying = _chosen_of_block(reached, costs[begin:stop], gone)
            else:
                staying = torch.ones_like(target, dtype=torch.bool)
            for place in range(stop - 1, begin - 1, -1):
                local = place - begin
                if pattern is not None and (columns - 1 - place) % of == 0:
                    run = slice(local + 1 - of, local + 1)
                    aims = torch.addmm(target[run], inner[run, local + 1 :], state[place + 1 : stop])
                    reached = _reached(state[begin:stop][run], aims, inner[run, run])
                    staying[run] = _chosen_of_run(reached, costs[begin:stop][run], pattern)
                aim = torch.addmv(target[local], state[place + 1 : stop].T, inner[local, local + 1 :])
                target[local] = aim.masked_fill_(~staying[local], 0)
                state[place].sub_(target[local])
            weight[:, factor.order[begin:stop]] = target.T
    return _by_column(state, factor.order)


def _by_column(state: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``[places, rows]`` as ``[rows, columns]``."""
    matrix = torch.empty_like(state.T, memory_format=torch.contiguous_format)
    matrix[:, order] = state.T
    return matrix


def _reached(weight: torch.Tensor, aims: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """What weights are by now, all of which have made up for the places that are done.

    An aim is where a place goes when those between it and the places that are done stay as they are in the
    model. They do not: each of them has made up for what was done too, and that is solved for from the
    highest place down.

    Args:
        weight: ``[places, rows]`` of the model.
        aims: ``[places, rows]``.
        inner: unit upper triangular ``[places, places]``, the factor among these places.
    """
    moved: torch.Tensor = torch.linalg.solve_triangular(inner, weight - aims, upper=True, unitriangular=True)
    return weight - moved


def _chosen_of_block(reached: torch.Tensor, costs: torch.Tensor, gone: int) -> torch.Tensor:
    """Where the weights of a block of places stay that are the dearest of all its rows and columns."""
    # Lower columns, which are higher places, go first where costs are the same.
    return lowest_mask(reached.square().mul_(costs).flip(0), gone).flip(0)


def _chosen_of_run(reached: torch.Tensor, costs: torch.Tensor, pattern: tuple[int, int]) -> torch.Tensor:
    """Where the weights of one run of places stay, in each row by itself."""
    kept, of = pattern
    scores = reached.square().mul_(costs).flip(0)
    return pattern_mask(scores.T, kept, of).T.flip(0)


def refit(weight: torch.Tensor, error: torch.Tensor, hessian: Hessian, *, damping: float, steps: int) -> None:
    """Move the weights that are not zero to where the error of the output is least, and leave the zeros.

    Conjugate gradients on ``(V - W)(H + damping)`` over the places of ``V`` that are not zero, with the
    diagonal for a preconditioner (Hestenes and Stiefel 1952; Saad 2003, "Iterative Methods for Sparse Linear
    Systems", algorithm 9.1), for all rows at once. A row whose damped error would not be lower in the end
    stays as it was.

    Args:
        weight: float32 ``[rows, columns]``, the matrix ``V`` to begin with; overwritten.
        error: float32 ``[rows, columns]``, the weights of the model less ``weight``; kept up to date.
        hessian: of the layer's input.
        damping: added to the diagonal, relative to its mean; keeps the weights near those of the model in
            directions that the calibration data hardly show.
        steps: of the descent; 0 changes nothing. With as many as there are columns, and without rounding, the
            error is the least that there is.
    """
    if steps == 0:
        return
    ridge = damping * hessian.mean_diagonal
    with full_precision():
        for rows in working_rows(weight):
            moved = _descended(weight[rows], error[rows], hessian.matrix, ridge, steps)
            weight[rows] += moved
            error[rows] -= moved


def _descended(
    weight: torch.Tensor, error: torch.Tensor, matrix: torch.Tensor, ridge: float, steps: int
) -> torch.Tensor:
    """By how much the weights of some rows are to be moved, ``[rows, columns]``."""
    staying = weight != 0
    scale = matrix.diagonal().add(ridge).clamp_(min=_NO_CURVATURE).reciprocal_()
    slope = torch.addmm(error, error, matrix, beta=ridge)
    before = (slope * error).sum(1, dtype=torch.float64)
    # What is left of the slope: half the negative gradient by the weights that may move.
    residual = slope.mul_(staying)
    direction = residual * scale
    strength = (residual * direction).sum(1, keepdim=True)
    moved = torch.zeros_like(weight)
    for _ in range(steps):
        bent = torch.addmm(direction, direction, matrix, beta=ridge)
        curvature = (direction * bent).sum(1, keepdim=True)
        length = torch.where(curvature > 0, strength / curvature, 0.0)
        moved.addcmul_(direction, length)
        residual.addcmul_(bent.mul_(staying), length, value=-1)
        scaled = residual * scale
        stronger = (residual * scaled).sum(1, keepdim=True)
        turn = torch.where(strength > 0, stronger / strength, 0.0)
        direction = torch.addcmul(scaled, direction, turn)
        strength = stronger
    left = error - moved
    after = (torch.addmm(left, left, matrix, beta=ridge) * left).sum(1, dtype=torch.float64)
    return torch.where((after < before).unsqueeze(1), moved, 0.0)
