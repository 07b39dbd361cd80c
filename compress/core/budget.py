"""What a compressed model may take: bits a weight, bytes, or divergence."""

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
