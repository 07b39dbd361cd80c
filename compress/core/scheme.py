"""How a weight matrix is laid out as integers: bits, group, symmetry and range.

Kept apart from the arithmetic (``numerics.affine``), so that options, plans and help pages can speak
of a scheme without importing torch.
"""

from dataclasses import dataclass
from typing import Literal

Range = Literal["narrow", "full"]
Bits = Literal[2, 3, 4, 5, 6, 8]
"""Numbers of bits that rounders offer."""


@dataclass(frozen=True)
class Scheme:
    """Uniform affine quantization of a matrix ``[rows, columns]`` along its columns.

    Attributes:
        bits: width of one integer, 2 to 8.
        group_size: columns that share one scale; ``None`` is one scale a row (per channel).
        symmetric: zero is the integer 0; otherwise each group has a zero point.
        range: of a symmetric scheme. ``narrow`` uses ``[-(2^(b-1)-1), 2^(b-1)-1]`` with scale
            ``amax / (2^(b-1)-1)``; ``full`` uses ``[-2^(b-1), 2^(b-1)-1]`` with scale
            ``amax / ((2^b-1)/2)``, the convention of compressed-tensors' own observers and of GPTQ.
    """

    bits: int
    group_size: int | None
    symmetric: bool = True
    range: Range = "full"

    @property
    def lowest(self) -> int:
        """The smallest integer of the scheme."""
        narrow = self.symmetric and self.range == "narrow"
        return -(1 << (self.bits - 1)) + (1 if narrow else 0)

    @property
    def highest(self) -> int:
        """The largest integer of the scheme."""
        return (1 << (self.bits - 1)) - 1

    @property
    def steps(self) -> int:
        """The number of steps between the lowest and the highest integer."""
        return self.highest - self.lowest

    def divides(self, columns: int) -> bool:
        """Whether the groups fit a matrix of this many columns."""
        return self.group_size is None or columns % self.group_size == 0

    def groups(self, columns: int) -> int:
        """How many scales one row of a matrix with this many columns has."""
        return 1 if self.group_size is None else columns // self.group_size

    def __str__(self) -> str:
        group = "channel" if self.group_size is None else f"group {self.group_size}"
        return f"int{self.bits} {group} {'symmetric' if self.symmetric else 'asymmetric'}"
