"""The stacks of blocks of a model, and how many blocks of each a user wants to keep.

A decoder or an encoder has one stack, an encoder-decoder two, which are shortened side by side: blocks are
chosen within their stack, and never in place of those of another. Nothing here imports torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from compress.core.errors import PlanError


@dataclass(frozen=True)
class Size:
    """How many blocks a user wants to keep.

    Attributes:
        share: of the blocks of each stack.
        blocks: their number, where it is not that of the share: of each stack, or one number for each of them
            in the order in which the model runs them.
        contiguous: whether those of a stack that go must be neighbours.
    """

    share: float
    blocks: int | tuple[int, ...] | None = None
    contiguous: bool = False

    def stay(self, total: int) -> int:
        """How many of so many blocks stay, where no number is said for their stack alone."""
        return self.blocks if isinstance(self.blocks, int) else max(1, round(total * self.share))


@dataclass(frozen=True)
class Stack:
    """Blocks that hand a hidden state from one to the next, and how many of them stay.

    Attributes:
        path: of the list that holds them.
        first: the number of its first block, counted over all stacks.
        size: how many blocks it has.
        stay: how many stay.
    """

    path: str
    first: int
    size: int
    stay: int

    @property
    def gone(self) -> int:
        """How many go."""
        return self.size - self.stay

    @property
    def numbers(self) -> range:
        """The numbers of its blocks."""
        return range(self.first, self.first + self.size)

    @property
    def starts(self) -> range:
        """The first blocks of all runs of neighbours that may go; none where no block goes."""
        return range(self.first, self.first + self.stay + 1) if self.gone else range(0)

    def window(self, start: int) -> tuple[int, ...]:
        """As many neighbours as go, from one block on."""
        return tuple(range(start, start + self.gone))

    def within(self, numbers: Sequence[int]) -> list[int]:
        """Those of some blocks that are of this stack, counted from its first."""
        return [number - self.first for number in numbers if number in self.numbers]


def shortened(blocks: Sequence[str], size: Size) -> tuple[Stack, ...]:
    """The stacks of a model, with as many blocks as a user wants to keep.

    Args:
        blocks: paths of all blocks, in order.

    Raises:
        PlanError: the numbers that were asked for are not those of these stacks.
    """
    paths = list(dict.fromkeys(block.rpartition(".")[0] for block in blocks))
    sizes = [sum(block.rpartition(".")[0] == path for block in blocks) for path in paths]
    named = ", ".join(f"{number} in {path}" for number, path in zip(sizes, paths, strict=True))
    hint = f"say a number for each stack, in order: --layers '[{', '.join(map(str, sizes))}]' would keep all"
    stays = list(size.blocks) if isinstance(size.blocks, tuple) else [size.stay(total) for total in sizes]
    if len(stays) != len(sizes):
        raise PlanError(f"{len(stays)} numbers of blocks for {len(sizes)} stacks of them ({named})", hint)
    if len(sizes) > 1 and any(stay > total for stay, total in zip(stays, sizes, strict=True)):
        asked = ", ".join(map(str, stays))
        raise PlanError(f"stacks cannot keep {asked} blocks: there are {named}", hint)
    firsts = [sum(sizes[:place]) for place in range(len(sizes))]
    return tuple(map(Stack, paths, firsts, sizes, stays))
