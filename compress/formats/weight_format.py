"""The contract of formats: from integers and scales to named tensors on disk, and the configuration."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compress.core.scheme import Scheme


@dataclass(frozen=True)
class Held:
    """One matrix that a format is asked to hold.

    Attributes:
        module: the module's name as the loader sees it; for experts the name each has on disk.
        kind: class name of the module that holds it.
        expert: whether it is a slice of a fused parameter.
        rows: output features.
        columns: input features.
        scheme: how it is quantized.
    """

    module: str
    kind: str
    expert: bool
    rows: int
    columns: int
    scheme: Scheme


class WeightFormat(ABC):
    """How quantized matrices are written. Everything a format cannot hold is refused at plan time."""

    name: str

    @abstractmethod
    def refusal(self, held: Held) -> str | None:
        """Why this matrix cannot be held, or ``None``."""

    @abstractmethod
    def refusal_together(self, held: Sequence[Held]) -> str | None:
        """Why these matrices cannot be held in one model, or ``None``."""

    @abstractmethod
    def encode(
        self, weight: str, parts: Mapping[str, torch.Tensor], scheme: Scheme
    ) -> dict[str, torch.Tensor]:
        """Tensors on disk for one matrix.

        Args:
            weight: the name that the float weight has on disk (``….q_proj.weight``).
            parts: ``q`` int8 ``[rows, columns]``, ``scale`` ``[rows, groups]``, optionally ``zero`` int8.
        """

    @abstractmethod
    def encoded_bytes(self, held: Held, scale_bytes: int) -> int:
        """Bytes on disk of one matrix, for the plan."""

    @abstractmethod
    def configuration(
        self, held: Sequence[Held], kept: Sequence[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The model's ``config.json`` with what a loader needs to know.

        Args:
            held: every matrix that was quantized.
            kept: linear modules that stay in floats.
            config: the configuration of the source.
        """
