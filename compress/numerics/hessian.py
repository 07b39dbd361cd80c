"""The Hessian of a layer's squared output error, and the factor by which errors are passed on.

For a linear layer with weight ``W`` and inputs ``X`` the error of a rounded weight ``V`` is
``|X (W - V)^T|^2 = tr((W - V) H (W - V)^T)`` with ``H = X^T X`` (Frantar et al. 2023, arXiv 2210.17323,
section 3). A factor of two and the number of tokens are left out: every use here is invariant to scale.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from compress.core.errors import CalibrationError
from compress.numerics.grouping import row_chunks
from compress.numerics.precision import full_precision
from compress.numerics.statistic import Statistic, check_sums

Order = Literal["static", "none"]

_BLOCK = 128
"""Columns of one strip of the triangle that is computed; narrow enough to skip most of the other half."""
_TOKENS = 1024
"""Tokens of one product: each reads and writes the whole triangle, so they should be many."""

_DAMPING_GROWTH = 4.0
_DAMPING_LIMIT = 1.0
_SMALLEST_RAISED = 1e-4


@dataclass(frozen=True)
class FeedbackFactor:
    """How the error of a column changes the targets of the columns that are rounded after it.

    With the columns in ``order``, ``H + damping = L diag(...) L^T`` with ``L`` unit lower triangular, and
    columns are rounded from the last place to the first. The target of place ``k`` is its weight plus
    the errors of the places after it times ``L[k+1:, k]`` (Chee et al. 2023, "QuIP", arXiv 2307.13304,
    equation 2, who prove in theorem 6 that this is GPTQ). Compared with GPTQ's factor of the inverse
    it saves the inversion, a third of the memory, and the squaring of rounding errors.

    Attributes:
        order: int64 ``[columns]``; the column at each place of the factor.
        unit: float32 ``[columns, columns]``, unit lower triangular.
        pivots: float32 ``[columns]``, the diagonal between the two: what one unit of squared error costs that
            enters at a place and that the places before it make up for as well as they can. It is one over
            the last diagonal entry of the inverse for the places up to it.
        damping: what was added to the diagonal, relative to the mean of its live entries.
    """

    order: torch.Tensor
    unit: torch.Tensor
    pivots: torch.Tensor
    damping: float

    @property
    def importance(self) -> torch.Tensor:
        """The pivot of each column, float32 ``[columns]``, in the order of the columns.

        What an error of rounding costs that the columns after it make up for: with feedback the error of
        the output is the sum of the squared differences between targets and values, each times its pivot.
        """
        return torch.empty_like(self.pivots).index_copy_(0, self.order, self.pivots)


class Hessian(Statistic):
    """Accumulates ``X^T X`` in float32 and factors it.

    Memory: the matrix itself, one factor of the same size (kept until another one is asked for, since
    several layers share a Hessian), and strips. The matrix is never changed by what is computed from it.

    Args:
        columns: width of the layer's input.
        device: where the matrix lies.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.columns = columns
        self.tokens = 0
        self._sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self._mirrored = True
        self._factor: tuple[float, Order, FeedbackFactor] | None = None

    @torch.no_grad()
    def add(self, rows: torch.Tensor) -> None:
        """Take in rows ``[tokens, columns]`` of any float dtype.

        Only the strips on and above the diagonal are computed: the matrix is symmetric.

        Raises:
            ValueError: the shape does not fit.
        """
        if rows.ndim != 2 or rows.shape[1] != self.columns:
            raise ValueError(f"expected rows [tokens, {self.columns}], got {list(rows.shape)}")
        with full_precision():
            for part in row_chunks(rows, _TOKENS * self.columns):
                values = rows[part].to(device=self._sum.device, dtype=torch.float32)
                for start in range(0, self.columns, _BLOCK):
                    strip = self._sum[start : start + _BLOCK, start:]
                    strip.addmm_(values[:, start : start + _BLOCK].T, values[:, start:])
        self.tokens += rows.shape[0]
        self._mirrored = False
        self._factor = None

    @property
    def matrix(self) -> torch.Tensor:
        """``X^T X``, float32 ``[columns, columns]``, exactly symmetric; do not write into it."""
        if not self._mirrored:
            for start in range(0, self.columns, _BLOCK):
                stop = min(start + _BLOCK, self.columns)
                corner = self._sum[start:stop, start:stop]
                corner.copy_(corner.triu() + corner.triu(1).T)
                self._sum[stop:, start:stop] = self._sum[start:stop, stop:].T
            self._mirrored = True
        return self._sum

    @property
    def diagonal(self) -> torch.Tensor:
        """Squared length of each input column, ``[columns]``, one for columns that were always zero."""
        diagonal = self._sum.diagonal()
        return torch.where(diagonal == 0, torch.ones_like(diagonal), diagonal)

    @property
    def dead(self) -> torch.Tensor:
        """Columns that were zero for every token, bool ``[columns]``: their weights do not matter."""
        return self._sum.diagonal() == 0

    @property
    def mean_diagonal(self) -> float:
        """Mean of the live diagonal entries, the unit of damping; 1 when no column is alive."""
        live = self._sum.diagonal()[~self.dead]
        return float(live.double().mean()) if live.numel() else 1.0

    def blocks(self, width: int, damping: float) -> torch.Tensor:
        """The damped Hessian of each group of ``width`` columns, ``[groups, width, width]``."""
        matrix = self.matrix
        blocks = torch.stack(
            [matrix[start : start + width, start : start + width] for start in range(0, self.columns, width)]
        )
        blocks.diagonal(dim1=1, dim2=2).add_(damping * self.mean_diagonal)
        return blocks

    def energy(self, matrix: torch.Tensor) -> float:
        """``tr(M H M^T)`` of float32 ``[rows, columns]``: what the layer puts out where ``M`` is its weight.

        Half of the product is enough here too.
        """
        total = 0.0
        with full_precision():
            for start in range(0, self.columns, _BLOCK):
                stop = min(start + _BLOCK, self.columns)
                own = matrix[:, start:stop]
                product = own @ self.matrix[start:stop, start:stop]
                product.addmm_(matrix[:, stop:], self.matrix[stop:, start:stop], alpha=2)
                total += float(product.mul_(own).sum(dtype=torch.float64))
        return total

    def check(self) -> None:
        """Refuse a statistic that no method can use.

        Raises:
            CalibrationError: no token was seen, or an input was NaN or infinite.
        """
        check_sums(self.tokens, self._sum.diagonal())

    def factor(self, damping: float, order: Order) -> FeedbackFactor:
        """The factor for this damping, or for the smallest larger one with which it exists.

        Where the factorization fails, the damping grows by a factor of four until it reaches the mean
        diagonal.

        Args:
            damping: relative to the mean of the live diagonal entries.
            order: ``static`` rounds columns in order of decreasing diagonal, so that the errors of the
                columns that matter most can be made up for by all others; ``none`` from left to right.

        Raises:
            CalibrationError: no data, unusable data, or no damping up to the limit sufficed.
        """
        self.check()
        if self._factor is not None and self._factor[:2] == (damping, order):
            return self._factor[2]
        self._factor = None
        places = self._places(order)
        attempt = damping
        while True:
            found = self._factorized(places, attempt)
            if found is not None:
                factor = FeedbackFactor(places, *found, attempt)
                self._factor = (damping, order, factor)
                return factor
            if attempt >= _DAMPING_LIMIT:
                raise CalibrationError(
                    f"the Hessian of {self.tokens} tokens and {self.columns} columns cannot be factored, "
                    f"even with damping {attempt:g}",
                    "calibrate on more tokens, or use quantize.rtn for this module",
                )
            attempt = min(max(attempt * _DAMPING_GROWTH, _SMALLEST_RAISED), _DAMPING_LIMIT)

    def _places(self, order: Order) -> torch.Tensor:
        """The column at each place; places are rounded from the last to the first."""
        if order == "none":
            return torch.arange(self.columns - 1, -1, -1, device=self._sum.device)
        return torch.argsort(self.diagonal, descending=True, stable=True).flip(0)

    def _factorized(self, places: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The unit lower factor, computed in place in one new matrix, and pivots; ``None`` without one."""
        matrix = self.matrix
        permuted = torch.empty_like(matrix)
        for rows in row_chunks(matrix):
            permuted[rows] = matrix[places[rows]][:, places]
        # LAPACK works on columns: of the transposed view, which is the same matrix, no copies are made.
        work = permuted.mT
        diagonal = work.diagonal()
        diagonal.copy_(self.diagonal[places] + damping * self.mean_diagonal)
        failed = torch.empty((), dtype=torch.int32, device=work.device)
        with full_precision():
            torch.linalg.cholesky_ex(work, out=(work, failed))
        pivots = work.diagonal().clone()
        if int(failed) != 0 or not bool((torch.isfinite(pivots) & (pivots > 0)).all()):
            return None
        return work.div_(pivots), pivots.square()
