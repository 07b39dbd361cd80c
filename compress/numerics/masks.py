"""Which weights and which channels stay: scores from activations, and the masks that follow from them.

Two scores. A single weight counts by its magnitude times the norm of the input that it multiplies, and is
compared with the other weights of its row (Sun et al. 2023, "Wanda", arXiv 2306.11695, equation 1). A
channel or a head counts by the mean of its activations over a sequence, in the root of the sum of squares
over sequences (Muralidharan et al. 2024, "Minitron", arXiv 2407.14679, section 2.2 and table 12).

Ties are broken by the index, so that no order of computation and no seed can matter: of equal scores the
weight with the lower index is pruned, and the channel with the lower index is kept.
"""

from typing import final

import torch

from compress.numerics.statistic import ColumnStatistic, Statistic, check_sums


@final
class ColumnNorms(ColumnStatistic):
    """The Euclidean norm of each input column over all tokens, accumulated as squares in float64.

    Args:
        columns: width of the layer's input.
        device: where rows are summed.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        super().__init__(columns, device)
        self._squares = torch.zeros(columns, dtype=torch.float64, device=device)

    def _take(self, values: torch.Tensor) -> None:
        self._squares += values.square().sum(0, dtype=torch.float64)

    @property
    def norms(self) -> torch.Tensor:
        """float32 ``[columns]``.

        Raises:
            CalibrationError: no token was seen, or an input was NaN or infinite.
        """
        check_sums(self.tokens, self._squares)
        return self._squares.sqrt().float()


@final
class PartImportance(Statistic):
    """How much parts of an input (channels, heads) carry.

    For one sequence the magnitude of a part (the Euclidean norm of its columns) is averaged over tokens;
    over sequences it is the root of the sum of squares, the aggregation that Minitron settles on.

    Args:
        columns: int64 ``[parts, width]``; the input columns of each part.
        device: where rows are summed.
    """

    def __init__(self, columns: torch.Tensor, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._columns = columns.to(device)
        self._squares = torch.zeros(columns.shape[0], dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, rows: torch.Tensor) -> None:
        """Take in one sequence, ``[tokens, columns]`` of any float dtype.

        Raises:
            ValueError: it is no matrix.
        """
        if rows.ndim != 2:
            raise ValueError(f"expected one sequence [tokens, columns], got {list(rows.shape)}")
        if rows.shape[0] == 0:
            return
        values = rows.to(self._squares.device).float()
        if self._columns.shape[1] == 1:
            magnitudes = values[:, self._columns[:, 0]].abs()
        else:
            magnitudes = torch.linalg.vector_norm(values[:, self._columns], dim=-1)
        self._squares += magnitudes.mean(0, dtype=torch.float64).square()
        self.tokens += rows.shape[0]

    @property
    def importance(self) -> torch.Tensor:
        """float64 ``[parts]`` on the CPU.

        Raises:
            CalibrationError: no token was seen, or an input was NaN or infinite.
        """
        check_sums(self.tokens, self._squares)
        return self._squares.sqrt().cpu()


def whole(count: int, share: float) -> int:
    """A share of a number of things, rounded down to whole ones.

    A share such as 0.29 of 100 is a hair below 29 in binary, and a quotient of two whole numbers gives the
    upper one back.
    """
    return int(count * share + 1e-6)


def row_mask(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The weights that stay when each row loses its lowest scores.

    Args:
        scores: ``[rows, columns]``.
        sparsity: share of each row that goes, rounded down to whole weights.

    Returns:
        bool ``[rows, columns]``, true where a weight stays.
    """
    gone = whole(scores.shape[1], sparsity)
    mask = torch.ones_like(scores, dtype=torch.bool)
    if gone:
        lowest = torch.sort(scores, dim=1, stable=True).indices[:, :gone]
        mask.scatter_(1, lowest, False)
    return mask


def lowest_mask(scores: torch.Tensor, gone: int) -> torch.Tensor:
    """The entries that stay when the lowest of all are taken away.

    Args:
        scores: of any shape; none is NaN.
        gone: how many go, at most all of them. Of equal scores those go first that come first, row after
            row.

    Returns:
        bool of the same shape, true where an entry stays.
    """
    if gone == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    bound = flat.kthvalue(gone).values
    staying = flat >= bound
    ties = (flat == bound).nonzero().squeeze(1)
    staying[ties[: gone - int((~staying).sum())]] = False
    return staying.view(scores.shape)


def pattern_mask(scores: torch.Tensor, kept: int, of: int) -> torch.Tensor:
    """The weights that stay when each run of neighbours in a row loses its lowest scores.

    Args:
        scores: ``[rows, columns]``, a multiple of ``of`` columns.
        kept: weights that stay in each run.
        of: neighbours that make a run.

    Returns:
        bool ``[rows, columns]``, true where a weight stays.

    Raises:
        ValueError: the runs do not divide the columns; plans refuse such layers earlier.
    """
    rows, columns = scores.shape
    if columns % of:
        raise ValueError(f"{columns} columns cannot be divided into runs of {of}")
    runs = scores.reshape(rows, columns // of, of)
    lowest = torch.sort(runs, dim=2, stable=True).indices[:, :, : of - kept]
    mask = torch.ones_like(runs, dtype=torch.bool)
    mask.scatter_(2, lowest, False)
    return mask.reshape(rows, columns)


def strongest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The places of the highest scores, in rising order of place; of equal scores the first ones.

    Args:
        scores: ``[parts]``.
        count: how many.

    Returns:
        int64 ``[count]``.
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values
