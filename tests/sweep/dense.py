"""Treatments that put plain floats in the place of plain floats, for tests of the sweep itself."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

from compress.numerics.statistic import Statistic
from compress.sweep.treatment import Replacement, Treatment


@final
@dataclass(frozen=True)
class Dense(Replacement):
    weight: torch.Tensor

    def rows(self, start: int, stop: int) -> "Dense":
        return Dense(self.weight[start:stop])

    def value(self) -> torch.Tensor:
        return self.weight

    def parts(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight}

    def notes(self) -> Mapping[str, float | int | str]:
        return {}


@final
class RowCount(Statistic):
    """How many rows came, each of the width that was told."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.tokens = 0

    def add(self, rows: torch.Tensor) -> None:
        assert rows.shape[1] == self.columns
        self.tokens += rows.shape[0]


class DenseTreatment(Treatment):
    """Counts the rows of every input, and writes floats under the names that they had."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    @property
    def calibrated(self) -> bool:
        return True

    def statistic(self, columns: int, device: torch.device) -> Statistic:
        return RowCount(columns)

    def rebuilt(self, parts: Mapping[str, torch.Tensor], label: Hashable) -> Replacement:
        return Dense(parts["weight"])

    def encode(
        self, weight: str, parts: Mapping[str, torch.Tensor], label: Hashable
    ) -> dict[str, torch.Tensor]:
        return {weight: parts["weight"]}

    def configuration(self) -> dict[str, Any]:
        return dict(self.config)
