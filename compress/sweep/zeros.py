"""How many weights of a matrix become zero, and in which pattern. Nothing here imports torch."""

from dataclasses import dataclass


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
    """How much of each row goes: a share, or what a pattern leaves out.

    Attributes:
        sparsity: share of the weights, rounded down to whole ones; not looked at beside a pattern.
        pattern: weights that stay in each run of neighbours.
    """

    sparsity: float
    pattern: Pattern | None = None

    def __str__(self) -> str:
        return f"{self.sparsity:.6g} of each row" if self.pattern is None else str(self.pattern)


@dataclass(frozen=True)
class Chosen:
    """What a pass was asked to prune.

    Attributes:
        zeros: how much of it.
        ignore: patterns of modules to leave whole.
        include: patterns of linear layers outside the blocks to prune too.
    """

    zeros: Zeros
    ignore: tuple[str, ...]
    include: tuple[str, ...]
