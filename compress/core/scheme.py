"""How a weight matrix is laid out as small numbers, and what happens to the inputs that it multiplies.

Kept apart from the arithmetic (``numerics.affine`` for integers, ``numerics.floats`` for small floats), so
that options, plans and help pages can speak of a scheme without importing torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Range = Literal["narrow", "full"]
Bits = Literal[2, 3, 4, 5, 6, 8]
"""Numbers of bits that rounders offer."""
Format = Literal["int", "fp8", "nvfp4", "mxfp4"]
"""What a number is: an integer, a float of 8 bits (E4M3), or one of 4 bits (E2M1) in one of two layouts."""
Activations = Literal["none", "dynamic", "static"]
"""Whether inputs are quantized while the model runs, and where their scale comes from."""

FLOAT_LAYOUTS: Final[Mapping[Format, tuple[Bits, int | None]]] = {
    "fp8": (8, None),
    "nvfp4": (4, 16),
    "mxfp4": (4, 32),
}
"""Bits and group of each float format: the format itself settles them."""

ACTIVATIONS: Final[Mapping[Format, tuple[Activations, ...]]] = {
    "int": ("none", "dynamic", "static"),
    "fp8": ("none", "dynamic", "static"),
    # A float32 scale of the whole input comes from calibration; scales of its groups are found on the fly.
    "nvfp4": ("none", "static"),
    "mxfp4": ("none", "dynamic"),
}
"""What can be done to the inputs of a layer whose weights have a format."""


@dataclass(frozen=True)
class Scheme:
    """Quantization of a matrix ``[rows, columns]`` along its columns, and of the inputs that it multiplies.

    Integers are uniform and affine. The float formats are symmetric, and each settles bits and group:
    ``fp8`` is E4M3 with one scale a row; ``nvfp4`` is E2M1 in groups of 16 with E4M3 scales, which are
    relative to one float32 number; ``mxfp4`` is E2M1 in groups of 32 with scales that are powers of two
    (E8M0; OCP Microscaling Formats, version 1.0).

    Inputs are rounded to 8 bits beside weights of 8 bits, a whole token (``dynamic``) or the whole tensor
    (``static``) with one scale; beside 4-bit floats they are rounded as the weights are, group by group.

    Attributes:
        bits: width of one number, 2 to 8.
        group_size: columns that share one scale; ``None`` is one scale a row (per channel).
        symmetric: zero is the integer 0; otherwise each group has a zero point.
        range: of a symmetric scheme of integers. ``narrow`` uses ``[-(2^(b-1)-1), 2^(b-1)-1]`` with scale
            ``amax / (2^(b-1)-1)``; ``full`` uses ``[-2^(b-1), 2^(b-1)-1]`` with scale
            ``amax / ((2^b-1)/2)``, the convention of compressed-tensors' own observers and of GPTQ.
        format: what a number is.
        activations: what is done to the inputs.
        tensor_scale: of ``nvfp4``, the float32 number that all scales of the matrix were multiplied by;
            it depends on the weights, so a scheme has it only once they have been seen.

    Raises:
        ValueError: bits, group, symmetry or activations that the format does not have.
    """

    bits: int
    group_size: int | None
    symmetric: bool = True
    range: Range = "full"
    format: Format = "int"
    activations: Activations = "none"
    tensor_scale: float | None = None

    def __post_init__(self) -> None:
        layout = FLOAT_LAYOUTS.get(self.format)
        if layout is not None and (layout != (self.bits, self.group_size) or not self.symmetric):
            raise ValueError(f"{self.format} does not come as {self._layout()}")
        if self.activations not in ACTIVATIONS[self.format]:
            raise ValueError(f"{self.format} has no {self.activations} activations")
        if self.tensor_scale is not None and self.format != "nvfp4":
            raise ValueError(f"{self.format} has no scale of the whole matrix")

    @property
    def integers(self) -> bool:
        """Whether weights are integers."""
        return self.format == "int"

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

    def _layout(self) -> str:
        group = "channel" if self.group_size is None else f"group {self.group_size}"
        return f"{self.bits} bits {group} {'symmetric' if self.symmetric else 'asymmetric'}"

    def __str__(self) -> str:
        group = "channel" if self.group_size is None else f"group {self.group_size}"
        if self.integers:
            words = f"int{self.bits} {group} {'symmetric' if self.symmetric else 'asymmetric'}"
        else:
            words = f"{self.format} {group}"
        return words if self.activations == "none" else f"{words}, {self.activations} activations"
