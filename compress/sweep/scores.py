"""Which weights stay by their scores, in the pattern or the share that was asked for."""

import torch

from compress.core.errors import CalibrationError
from compress.numerics.masks import ColumnNorms, lowest_mask, pattern_mask, row_mask, whole
from compress.numerics.statistic import Statistic
from compress.sweep.zeros import Zeros


def staying(scores: torch.Tensor, zeros: Zeros) -> torch.Tensor:
    """Where weights stay, bool ``[rows, columns]``; of equal scores the first ones go.

    Args:
        scores: ``[rows, columns]`` of one matrix; of several stacked ones where rows are compared with
            nothing but themselves.
    """
    if zeros.pattern is not None:
        return pattern_mask(scores, zeros.pattern.kept, zeros.pattern.of)
    if zeros.among == "row":
        return row_mask(scores, zeros.sparsity)
    return lowest_mask(scores, whole(scores.numel(), zeros.sparsity))


def by_input(weight: torch.Tensor, statistic: Statistic | None) -> torch.Tensor:
    """The magnitude of each weight times the norm of the input that it multiplies.

    Raises:
        CalibrationError: nothing is known of the input.
    """
    if not isinstance(statistic, ColumnNorms):
        raise CalibrationError("weights cannot be scored without their input", "give calibration text")
    return weight.abs() * statistic.norms
