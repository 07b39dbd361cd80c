"""What is learned: the loss of a batch and its gradient, apart from how it is optimised."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Losses:
    """Sums over predicted positions.

    Attributes:
        sums: float64 scalars on the device, by name; `Objective.names` lists them.
        positions: how many were predicted.
    """

    sums: Mapping[str, torch.Tensor]
    positions: int

    def plus(self, other: "Losses") -> "Losses":
        """The sums over both."""
        return Losses(
            {name: total + other.sums[name] for name, total in self.sums.items()},
            self.positions + other.positions,
        )

    def means(self) -> dict[str, float]:
        """Nats a position, by name."""
        return {name: float(total) / self.positions for name, total in self.sums.items()}


class Objective(ABC):
    """A loss over windows of tokens."""

    names: tuple[str, ...]
    """What a loss consists of; the first, ``loss``, is what is minimised."""

    @abstractmethod
    def positions(self, windows: torch.Tensor) -> int:
        """What the losses of these windows are a mean over; `windows` as in `learn`."""

    @abstractmethod
    def learn(self, windows: torch.Tensor, positions: float) -> Losses:
        """Add the gradient of the mean loss to the weights' gradients.

        Args:
            windows: int64 ``[batch, length]``, on the device.
            positions: by how many the sum over the batch is divided: those of the whole optimisation step.
        """

    @abstractmethod
    def judge(self, windows: torch.Tensor) -> Losses:
        """The loss, without a gradient; `windows` as in `learn`."""
