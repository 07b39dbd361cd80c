"""What a calibrated method gathers from the inputs of a layer."""

from abc import ABC, abstractmethod

import torch


class Statistic(ABC):
    """An accumulator over the rows of a layer's input.

    Attributes:
        tokens: rows seen so far; a layer that saw none must not be rounded in silence.
    """

    tokens: int = 0

    @abstractmethod
    def add(self, rows: torch.Tensor) -> None:
        """Take in more rows, shape ``[tokens, columns]``, any float dtype."""
