"""Making up for what was cut: the least change of a matrix that brings its outputs back, by ridge regression.

Two problems have the same solution. Where input columns of a layer go, the outputs that they gave are
regressed on the columns that stay. Where whole layers go, what the hidden state lacks is regressed on the
inputs of a layer that is still there. Both regress what is *lost*, so a larger ridge changes less and an
infinite one leaves the weights as they are (Hoerl and Kennard 1970, "Ridge Regression", equation 2.1, with
the old weights in the place of zero). Only second moments are needed, so memory does not grow with the text.
"""

from dataclasses import dataclass
from typing import Final, final

import torch

from compress.core.errors import CalibrationError
from compress.numerics.grouping import row_chunks
from compress.numerics.precision import full_precision
from compress.numerics.statistic import check_sums

COLUMNS_RIDGE: Final = 0.1
"""Where columns went, relative to the mean square of the inputs: held-out loss hardly depends on it below."""
LAYERS_RIDGE: Final = 0.3
"""Where whole layers went, likewise. What they did is only partly in these inputs, and a small ridge fits the
rest to the text at hand: on held-out text a third of this already loses a fifth of the gain."""


def ridge(
    gram: torch.Tensor, moment: torch.Tensor, strength: float, *, intercept: bool = False
) -> torch.Tensor:
    """``X`` that makes ``|A X - B|^2 + s |X|^2`` least, float64 ``[columns, targets]``.

    Args:
        gram: ``A^T A``, ``[columns, columns]``.
        moment: ``A^T B``, ``[columns, targets]``.
        strength: ``s`` relative to the mean of the live diagonal entries of ``gram``.
        intercept: whether the last column of ``A`` is the constant one, which no ridge holds back.

    Raises:
        CalibrationError: the matrix cannot be factored; any ridge above rounding makes it so that it can.
    """
    penalised = gram.shape[0] - int(intercept)
    system = gram.to(torch.float64, copy=True)
    diagonal = system.diagonal()
    live = diagonal[:penalised]
    unit = float(live[live > 0].mean()) if bool((live > 0).any()) else 1.0
    diagonal[:penalised] += strength * unit
    # A column that was always zero has no say in anything: its row of the solution is zero.
    diagonal[diagonal == 0] = 1.0
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed) != 0:
        raise CalibrationError(
            f"the least squares of {gram.shape[0]} columns cannot be solved with a ridge of {strength:g}",
            "calibrate on more tokens, or leave the repair out",
        )
    return torch.cholesky_solve(moment.double(), factor)


@dataclass(frozen=True)
class Absorbed:
    """A matrix some of whose input columns are gone, with what it was changed by to make up for them.

    Attributes:
        change: float64 ``[rows, kept]``, to be added to the columns that stay.
        shift: float64 ``[rows]``, to be added to the bias; ``None`` where the layer has none.
        before: squared error of all outputs without the change, relative to their squares.
        after: the same with it.
    """

    change: torch.Tensor
    shift: torch.Tensor | None
    before: float
    after: float


def absorbed(
    weight: torch.Tensor,
    gram: torch.Tensor,
    kept: torch.Tensor,
    *,
    intercept: bool = False,
    strength: float = COLUMNS_RIDGE,
) -> Absorbed:
    """What the columns that stay must take over from those that go.

    Args:
        weight: ``[rows, columns]`` as it was.
        gram: second moments of its inputs, ``[columns, columns]``; with an intercept those of the inputs
            with a one behind them, ``[columns + 1, columns + 1]``.
        kept: int64, the columns that stay, in order.
        intercept: whether the layer has a bias that may move.
        strength: of the ridge, see `ridge`.

    Raises:
        CalibrationError: as `ridge`.
        ValueError: the shapes do not fit.
    """
    columns = weight.shape[1]
    if gram.shape[0] != columns + int(intercept):
        raise ValueError(f"{columns} columns and second moments {list(gram.shape)} do not fit")
    matrix, kept = weight.to(gram.device).double(), kept.to(gram.device)
    mask = torch.ones(columns, dtype=torch.bool, device=gram.device)
    mask[kept] = False
    gone = mask.nonzero().flatten()
    held = torch.cat([kept, kept.new_tensor([columns])]) if intercept else kept
    cut = matrix[:, gone]
    # Only the parts that are needed are widened: the whole matrix is the largest thing here.
    moment = gram[held][:, gone].double() @ cut.T
    system = gram[held][:, held].double()
    found = ridge(system, moment, strength, intercept=intercept)
    plain = matrix.to(gram.dtype)
    with full_precision():
        whole = float(((plain @ gram[:columns, :columns]) * plain).sum(dtype=torch.float64))
    lost = float(((cut @ gram[gone][:, gone].double()) * cut).sum())
    left = lost + _change(found, system, moment)
    scale = whole if whole > 0 else 1.0
    change, shift = (found[:-1], found[-1]) if intercept else (found, None)
    return Absorbed(change.T.contiguous(), shift, max(lost, 0.0) / scale, max(left, 0.0) / scale)


@dataclass(frozen=True)
class Correction:
    """A change of a layer by which its outputs come nearer to targets.

    Attributes:
        change: float64 ``[targets, columns]``, to be added to the weight.
        shift: float64 ``[targets]``, to be added to the bias; ``None`` where the layer has none.
        before: mean squared distance to the targets, each in units of the target's own length.
        after: the same with the change.
    """

    change: torch.Tensor
    shift: torch.Tensor | None
    before: float
    after: float


@final
class Moments:
    """Second moments of a layer's inputs, and of them with what its outputs lack.

    Every token counts by the inverse square of its target's length: what follows normalises the hidden
    state, and a few tokens of most models are hundreds of times longer than all others.

    Args:
        columns: width of the layer's input.
        targets: width of its output.
        intercept: whether the layer has a bias that may move.
        device: where sums lie.
        dtype: of the sums.
    """

    def __init__(
        self,
        columns: int,
        targets: int,
        *,
        intercept: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.columns, self.targets, self.intercept = columns, targets, intercept
        self.tokens = 0
        width = columns + int(intercept)
        self._gram = torch.zeros(width, width, dtype=dtype, device=device)
        self._moment = torch.zeros(width, targets, dtype=dtype, device=device)
        self._squares = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, inputs: torch.Tensor, lost: torch.Tensor, targets: torch.Tensor) -> None:
        """Take in more tokens, of any float dtype.

        Args:
            inputs: of the layer, ``[tokens, columns]``.
            lost: what its outputs lack, ``[tokens, targets]``.
            targets: what they should be, ``[tokens, targets]``.

        Raises:
            ValueError: the shapes do not fit.
        """
        expected = ((len(inputs), self.columns), (len(inputs), self.targets), (len(inputs), self.targets))
        came = tuple(tuple(values.shape) for values in (inputs, lost, targets))
        if came != expected:
            raise ValueError(f"expected inputs, losses and targets of {expected}, got {came}")
        device, dtype = self._gram.device, self._gram.dtype
        with full_precision():
            for part in row_chunks(inputs):
                values = inputs[part].to(device, dtype)
                if self.intercept:
                    values = torch.cat([values, torch.ones_like(values[:, :1])], dim=1)
                length = torch.linalg.vector_norm(targets[part].to(device, dtype), dim=1, keepdim=True)
                # A target of zeros has no length to be measured in; it is left out.
                share = torch.where(length == 0, torch.zeros_like(length), 1.0 / length)
                values, missing = values * share, lost[part].to(device, dtype) * share
                self._gram.addmm_(values.T, values)
                self._moment.addmm_(values.T, missing)
                self._squares += missing.square().sum(dtype=torch.float64)
        self.tokens += len(inputs)

    def correction(self, strength: float = LAYERS_RIDGE) -> Correction:
        """The change that brings the outputs nearest to the targets.

        Args:
            strength: of the ridge, see `ridge`.

        Raises:
            CalibrationError: no token was seen, an input was NaN or infinite, or as `ridge`.
        """
        check_sums(self.tokens, self._gram.diagonal())
        check_sums(self.tokens, self._squares)
        found = ridge(self._gram, self._moment, strength, intercept=self.intercept)
        before = float(self._squares)
        after = before + _change(found, self._gram.double(), self._moment.double())
        change, shift = (found[:-1], found[-1]) if self.intercept else (found, None)
        return Correction(change.T.contiguous(), shift, before / self.tokens, max(after, 0.0) / self.tokens)


def _change(found: torch.Tensor, gram: torch.Tensor, moment: torch.Tensor) -> float:
    """By how much a solution changes the squared error: ``|A X - B|^2 - |B|^2``."""
    return float((found * (gram @ found)).sum() - 2 * (found * moment).sum())
