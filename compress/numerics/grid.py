"""The numbers that a scheme can hold in each group of a matrix, with the columns in front.

Methods that round one column of all rows after another want each column contiguous, so matrices are
transposed here: ``[columns, rows]``, and ``[groups, rows]`` for scales and zero points.
"""

from dataclasses import dataclass, field
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
    _steps: tuple[torch.Tensor, ...] = field(init=False)
    _zeros: tuple[torch.Tensor, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        # A walk over the columns of a small matrix takes as long as its indexing does.
        object.__setattr__(self, "_steps", self.step.unbind(0))
        object.__setattr__(self, "_zeros", None if self.zero is None else self.zero.unbind(0))

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

    def nearest(self, target: torch.Tensor, group: int, out: torch.Tensor) -> torch.Tensor:
        """The nearest integers of one column of a group, as floats ``[rows]``; ``target`` is overwritten."""
        levels = target.div_(self._steps[group]).round_()
        if self._zeros is not None:
            levels.add_(self._zeros[group])
        return torch.clamp(levels, self.lowest, self.highest, out=out)

    def emptied(self, levels: torch.Tensor, held: torch.Tensor, group: int) -> torch.Tensor:
        """Integers of one column, ``[rows]``, overwritten where they are held, bool ``[rows]``: with zero."""
        if self._zeros is None:
            return levels.masked_fill_(held, 0)
        return levels.copy_(torch.where(held, self._zeros[group], levels))

    def stored(self, levels: torch.Tensor, group: int, out: torch.Tensor) -> torch.Tensor:
        """What a loader makes of the integers ``[rows]`` of one column, in the storage dtype."""
        offset = levels if self._zeros is None else levels - self._zeros[group]
        return torch.mul(offset, self._steps[group], out=out)

    def values(self, levels: torch.Tensor, group: int | torch.Tensor) -> torch.Tensor:
        """What a loader makes of the integers ``[columns, rows]``, as float32.

        All are of one group, or ``group`` is that of each column.
        """
        offset = levels if self.zero is None else levels - self.zero[group]
        value = offset * self.step[group]
        return value if self.storage == torch.float32 else value.to(self.storage).float()
