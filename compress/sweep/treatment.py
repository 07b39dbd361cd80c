"""What a sweep does to the matrices that it visits: the seam between the sweep and the methods."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch

from compress.numerics.statistic import Statistic

if TYPE_CHECKING:
    from compress.sweep.joint import JointTreatment


class Replacement(ABC):
    """New contents of one matrix, or of several whose rows are stacked."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> "Replacement":
        """The replacement of some of the rows."""

    @abstractmethod
    def value(self) -> torch.Tensor:
        """The matrix ``[rows, columns]`` as a loader will see it."""

    @abstractmethod
    def parts(self) -> dict[str, torch.Tensor]:
        """What is written of it, each with the rows in front, so that it can be split like the matrix."""

    @abstractmethod
    def notes(self) -> Mapping[str, float | int | str]:
        """What the table of layers says of these rows alone."""


@dataclass(frozen=True)
class Treated:
    """A replacement, and what the method did to get there, for the table of layers."""

    replacement: Replacement
    notes: Mapping[str, float | int | str] = field(default_factory=dict)


class Treatment(ABC):
    """What to gather for a matrix and what to put in its place.

    A *label* says how a matrix is treated (a scheme of quantization, say); matrices that share an input
    and a label are treated in one call.
    """

    @property
    @abstractmethod
    def calibrated(self) -> bool:
        """Whether calibration batches have to run."""

    @property
    @abstractmethod
    def staged(self) -> bool:
        """Whether a matrix sees what was done to those before it in its own block.

        Otherwise all statistics of a block are gathered from the block as it was, in one pass.
        """

    @property
    @abstractmethod
    def original(self) -> bool:
        """Whether it compares with the original model, whose activations are then kept beside the others."""

    @property
    @abstractmethod
    def joint(self) -> "JointTreatment | None":
        """What is done to all matrices of a block at once after that; it wants the original's activations."""

    @abstractmethod
    def statistic(self, columns: int, device: torch.device) -> Statistic | None:
        """A fresh accumulator for an input of so many columns."""

    @abstractmethod
    def treat(self, weight: torch.Tensor, statistic: Statistic | None, label: Hashable) -> Treated:
        """New contents for stacked matrices, float32 ``[rows, columns]``, free to be overwritten."""

    @abstractmethod
    def rebuilt(self, parts: Mapping[str, torch.Tensor], label: Hashable) -> Replacement:
        """A replacement back from its parts."""

    @abstractmethod
    def encode(
        self, weight: str, parts: Mapping[str, torch.Tensor], label: Hashable
    ) -> dict[str, torch.Tensor]:
        """Tensors on disk for one matrix, whose float weight has the name ``weight`` there."""

    @abstractmethod
    def configuration(self) -> dict[str, Any]:
        """The model's ``config.json`` after the treatment."""


class SeparateTreatment(Treatment):
    """A treatment of each matrix by itself, on its block as it was; the configuration is settled before."""

    @final
    @property
    def staged(self) -> bool:
        """Statistics are those of the block as it was."""
        return False

    @final
    @property
    def original(self) -> bool:
        """Nothing is compared with the original model."""
        return False

    @final
    @property
    def joint(self) -> None:
        """Nothing is done to a whole block."""
        return None
