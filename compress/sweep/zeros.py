"""How many weights of a matrix become zero, and in which pattern. Nothing here imports torch."""

from dataclasses import dataclass
from typing import Literal

Among = Literal["row", "matrix"]
"""Which weights are compared with each other where no pattern says it."""


@dataclass(frozen=True)
class Pattern:
    """At most ``kept`` weights that are not zero among each ``of`` neighbours in a row."""

    kept: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """A pattern from ``N:M``.

        Raises:
            ValueError: it is not two whole numbers with 0 < N < M.
        """
        first, separator, second = text.partition(":")
        if not (separator and first.isdecimal() and second.isdecimal() and 0 < int(first) < int(second)):
            raise ValueError(f"expected N:M with 0 < N < M, such as 2:4, got '{text}'")
        return cls(int(first), int(second))

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"


@dataclass(frozen=True)
class Zeros:
    """How much of a matrix goes: a share, or what a pattern leaves out.

    Attributes:
        sparsity: share of the weights, rounded down to whole ones; that of the pattern where there is one.
        pattern: weights that stay in each run of neighbours.
        among: what the share is of: of each row, or of the matrix as a whole.
    """

    sparsity: float
    pattern: Pattern | None = None
    among: Among = "row"

    def __str__(self) -> str:
        if self.pattern is not None:
            return str(self.pattern)
        return f"{self.sparsity:.6g} of {'each row' if self.among == 'row' else 'the matrix'}"
