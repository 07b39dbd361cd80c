"""Random choices that are the same on every machine and in every version of Python."""

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar, final

Item = TypeVar("Item")


@final
class Draws:
    """A stream of choices from a name.

    Only `random.Random.random` is asked: of all methods it alone is promised to give the same numbers in
    every version, and ``choice`` and ``shuffle`` have changed before.

    Args:
        name: of the stream; another name is another stream.
    """

    def __init__(self, name: str) -> None:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        # The seed is an integer, because how strings become seeds is not promised.
        self._random = random.Random(seed)

    def below(self, limit: int) -> int:
        """An integer in ``[0, limit)``."""
        return min(int(self._random.random() * limit), limit - 1)

    def between(self, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``, both included."""
        return low + self.below(high - low + 1)

    def holds(self, share: float) -> bool:
        """True with this probability."""
        return self._random.random() < share

    def one(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.below(len(items))]

    def some(self, items: Sequence[Item], count: int) -> list[Item]:
        """Different items in random order.

        Raises:
            ValueError: there are fewer than that.
        """
        if count > len(items):
            raise ValueError(f"{count} of {len(items)} items")
        left = list(items)
        for at in range(count):
            other = at + self.below(len(left) - at)
            left[at], left[other] = left[other], left[at]
        return left[:count]

    def mixed(self, items: Sequence[Item]) -> list[Item]:
        """All items in random order."""
        return self.some(items, len(items))

    def weighted(self, weights: Sequence[float]) -> int:
        """The number of one of the weights, drawn in proportion to it."""
        mark = self._random.random() * sum(weights)
        for at, weight in enumerate(weights):
            mark -= weight
            if mark < 0:
                return at
        return len(weights) - 1
