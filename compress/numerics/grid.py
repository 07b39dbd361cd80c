"""The numbers that a scheme can hold in each group of a matrix, with the columns in front.

Methods that round one column of all rows after another want each column contiguous, so matrices are
transposed here: ``[columns, rows]``, and ``[groups, rows]`` for scales and zero points.
"""

from dataclasses import dataclass
from typing import Self, final

import torch

from compress.core.scheme import Scheme
from compress.numerics.grouping import group_width


@final
@dataclass(frozen=True)
class Grid:
    """Levels of a scheme for some rows.

    Attributes:
        step: float32 ``[groups, rows]``, each a number of the storage dtype.
        zero: float32 ``[groups, rows]``, ``None`` for a symmetric scheme.
        lowest: the least integer.
        highest: the largest integer.
        width: columns of a group.
        storage: the dtype in which scales are stored and weights come back.
    """

    step: torch.Tensor
    zero: torch.Tensor | None
    lowest: int
    highest: int
    width: int
    storage: torch.dtype

    @classmethod
    def of(
        cls, scale: torch.Tensor, zero: torch.Tensor | None, scheme: Scheme, columns: int, rows: slice
    ) -> Self:
        """Of some rows of a matrix with this many columns; ``scale`` and ``zero`` are ``[rows, groups]``."""
        return cls(
            scale[rows].float().T.contiguous(),
            None if zero is None else zero[rows].float().T.contiguous(),
            scheme.lowest,
            scheme.highest,
            group_width(columns, scheme),
            scale.dtype,
        )

    def columns_to_groups(self, columns: torch.Tensor) -> list[int]:
        """The group of each column."""
        groups: list[int] = (columns // self.width).tolist()
        return groups

    def nearest(self, target: torch.Tensor, group: int) -> torch.Tensor:
        """The nearest integers, as floats; ``target`` is ``[rows]``, a column of the group."""
        levels = torch.div(target, self.step[group]).round_()
        if self.zero is not None:
            levels.add_(self.zero[group])
        return levels.clamp_(self.lowest, self.highest)

    def emptied(self, levels: torch.Tensor, held: torch.Tensor, group: int) -> torch.Tensor:
        """Integers of one column, ``[rows]``, with those that are held, bool ``[rows]``, meaning zero."""
        return levels.masked_fill_(held, 0) if self.zero is None else levels.where(~held, self.zero[group])

    def values(self, levels: torch.Tensor, group: int | torch.Tensor) -> torch.Tensor:
        """What a loader makes of the integers, rounded to the storage dtype.

        ``levels`` is ``[..., rows]``, of one group; or ``[columns, rows]`` with the group of each column.
        """
        offset = levels if self.zero is None else levels - self.zero[group]
        value = offset * self.step[group]
        return value if self.storage == torch.float32 else value.to(self.storage).float()
