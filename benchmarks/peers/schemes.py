"""What a program is asked to make of the weights: bits in groups, or zeros. One word each, for all runners.

Imported inside each program's own environment, so it needs only the standard library.
"""

import re
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class Rounding:
    """Bits of a weight, and columns that share a scale; `3/128` is 3 bits in groups of 128."""

    bits: int
    group_size: int

    def __str__(self) -> str:
        return f"{self.bits}/{self.group_size}"

    @property
    def folder(self) -> str:
        return f"w{self.bits}-g{self.group_size}"

    @property
    def record(self) -> dict[str, int | str]:
        """What an arm is known by in the report."""
        return {"bits": self.bits, "group_size": self.group_size}


@final
@dataclass(frozen=True)
class Zeros:
    """Weights that become zero: `50%` of each matrix, or `2:4`, all but two of each four neighbours."""

    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def folder(self) -> str:
        return self.text.replace(":", "-of-").replace("%", "-percent")

    @property
    def record(self) -> dict[str, int | str]:
        """What an arm is known by in the report."""
        return {"zeros": self.text}

    @property
    def pattern(self) -> tuple[int, int] | None:
        """How many weights stay, of how many neighbours; nothing where a share is asked for."""
        if "%" in self.text:
            return None
        kept, of = self.text.split(":")
        return int(kept), int(of)

    @property
    def share(self) -> float:
        """Of the weights of each matrix."""
        if self.pattern is None:
            return int(self.text.removesuffix("%")) / 100
        kept, of = self.pattern
        return 1 - kept / of


Scheme = Rounding | Zeros


def parse_scheme(text: str) -> Scheme:
    """The scheme of a word.

    Raises:
        ValueError: it is neither BITS/GROUP nor SHARE% nor KEPT:OF.
    """
    if rounding := re.fullmatch(r"(\d+)/(\d+)", text):
        return Rounding(int(rounding[1]), int(rounding[2]))
    if re.fullmatch(r"\d+%|\d+:\d+", text):
        return Zeros(text)
    raise ValueError(f"expected a scheme such as 3/128, 50% or 2:4, got '{text}'")
