"""What a calibrated method gathers from the inputs of a layer."""

from abc import ABC, abstractmethod
from typing import final

import torch

from compress.core.errors import CalibrationError


class Statistic(ABC):
    """An accumulator over the rows of a layer's input.

    Attributes:
        tokens: rows seen so far; a layer that saw none must not be rounded in silence.
    """

    tokens: int = 0

    @abstractmethod
    def add(self, rows: torch.Tensor) -> None:
        """Take in more rows, shape ``[tokens, columns]``, any float dtype."""


class ColumnStatistic(Statistic):
    """An accumulator of numbers for each column alone, from rows in float32 on its own device.

    Args:
        columns: width of the layer's input.
        device: where rows are summed.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.columns = columns
        self.tokens = 0
        self._device = torch.device(device)

    @final
    @torch.no_grad()
    def add(self, rows: torch.Tensor) -> None:
        """Take in rows ``[tokens, columns]`` of any float dtype.

        Raises:
            ValueError: the shape does not fit.
        """
        if rows.ndim != 2 or rows.shape[1] != self.columns:
            raise ValueError(f"expected rows [tokens, {self.columns}], got {list(rows.shape)}")
        if rows.shape[0] == 0:
            return
        self._take(rows.to(self._device).float())
        self.tokens += rows.shape[0]

    @abstractmethod
    def _take(self, values: torch.Tensor) -> None:
        """Take in one row or more, float32 ``[tokens, columns]`` on the device; not to be changed."""


def check_sums(tokens: int, sums: torch.Tensor) -> None:
    """Refuse sums over inputs that tell nothing.

    Args:
        tokens: how many were summed.
        sums: over their values, any shape.

    Raises:
        CalibrationError: no token was seen, or an input was NaN or infinite.
    """
    if tokens == 0:
        raise CalibrationError(
            "no calibration token reached this layer",
            "calibrate on more or other text, or leave the module out with `ignore`",
        )
    if not bool(torch.isfinite(sums).all()):
        raise CalibrationError(
            "the calibration inputs of this layer hold NaN or infinite values",
            "check that the model is sound in this dtype: does it give finite losses on the text?",
        )
