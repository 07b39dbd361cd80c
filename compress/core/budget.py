"""What a compressed model may take: bits a weight, bytes, divergence, parameters; how fast it must be."""

import re
from dataclasses import dataclass
from typing import Final, Literal

_SIZE: Final = re.compile(r"(?P<count>\d+(\.\d+)?) ?((?P<prefix>[KMGT])(?P<binary>i?))?B")
_PREFIXES: Final = "KMGT"


@dataclass(frozen=True)
class Budget:
    """A limit.

    Attributes:
        of: what is limited: bits of one weight on average, bytes of all tensors on disk, or nats a position.
        limit: the most there may be.
    """

    of: Literal["bits", "bytes", "divergence"]
    limit: float

    def __str__(self) -> str:
        unit = {"bits": "bits a weight", "bytes": "bytes", "divergence": "nats a position"}[self.of]
        return f"{self.limit:,.15g} {unit}"


_NUMBER: Final = re.compile(r"\d+(_\d+)*(\.\d+)?")


@dataclass(frozen=True)
class SizeBudget:
    """A limit of a model whose shape is cut.

    Attributes:
        of: what is limited: the parameters of the body, inside the blocks, as a share of what they are now or
            as their number; bytes of all tensors on disk; or the predicted speed of decoding, as a multiple
            of what it is now, which has to be reached.
        limit: the most there may be, and of speed the least.
    """

    of: Literal["share", "parameters", "bytes", "speed"]
    limit: float

    @classmethod
    def parse(cls, text: str) -> "SizeBudget":
        """A budget from ``50%``, ``1_500_000``, ``500MB`` or ``1.5x``.

        Raises:
            ValueError: it is none of these, or would leave the model as it is or nothing of it.
        """
        text = text.strip()
        number, unit = (text[:-1], text[-1]) if text[-1:] in ("%", "x") else (text, "")
        if not unit and not _NUMBER.fullmatch(text):
            return cls("bytes", bytes_of(text))
        if not _NUMBER.fullmatch(number):
            raise ValueError(
                f"a budget is a share such as 50%, parameters such as 1_500_000, a size such as 500MB or a "
                f"speed such as 1.5x; got '{text}'"
            )
        value = float(number.replace("_", ""))
        if unit == "%" and not 0 < value < 100:
            raise ValueError(f"a share of the parameters lies between 0% and 100%, got '{text}'")
        if unit == "x" and value <= 1:
            raise ValueError(f"a speed is a multiple above 1x of what it is now, got '{text}'")
        if unit == "%":
            return cls("share", value / 100)
        return cls("speed", value) if unit == "x" else cls("parameters", value)

    def __str__(self) -> str:
        said = {
            "share": f"{self.limit:.6%} of the body's parameters",
            "parameters": f"{self.limit:,.15g} parameters in the body",
            "bytes": f"{self.limit:,.15g} bytes",
            "speed": f"{self.limit:.6g} times the predicted speed",
        }
        return said[self.of]


def bytes_of(size: str) -> int:
    """A number with a unit as bytes: ``2GB`` is 2 * 1000^3, ``2GiB`` is 2 * 1024^3.

    Raises:
        ValueError: it is no number with such a unit.
    """
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise ValueError(f"a size is a number with a unit, such as 2GB, 600MiB or 1500000B; got '{size}'")
    power = _PREFIXES.index(match["prefix"]) + 1 if match["prefix"] else 0
    return int(float(match["count"]) * (1024 if match["binary"] else 1000) ** power)
