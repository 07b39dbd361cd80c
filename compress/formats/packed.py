"""Formats that another engine's kernels read: the same integers, scales and zero points, laid out its way.

A model is converted into such a format, never rounded into it. What a format cannot hold exactly is refused
with the name of the layer; a number that is not exact in float16 is rounded only where a person said so.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from compress.core.errors import PlanError
from compress.formats.weight_format import Held, WeightFormat

Inexact = Literal["refuse", "round"]
"""What to do about a number that float16 cannot hold exactly."""

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Local names of the tensors of one matrix, each with dtype and shape."""


@dataclass(frozen=True)
class Weights:
    """One matrix as a reader of a format understands it.

    Attributes:
        integers: what is multiplied, zero point taken off: int16 ``[rows, columns]``.
        scales: float32, one for each integer or broadcast over them, ``[rows, columns]``.
    """

    integers: torch.Tensor
    scales: torch.Tensor

    def value(self) -> torch.Tensor:
        """The matrix in float32; exact, because integers of 9 bits times scales of 11 bits fit into 24."""
        return torch.mul(self.integers.float(), self.scales)


class PackedFormat(WeightFormat):
    """A format in safetensors, a matrix in tensors beside each other: ``q_proj.qweight``, ``.scales``."""

    @abstractmethod
    def layout(self, held: Held) -> Layout:
        """The tensors of one matrix by local name, with dtype and shape."""

    @abstractmethod
    def read(self, tensors: Mapping[str, torch.Tensor], module: str, config: Mapping[str, Any]) -> Weights:
        """One matrix from its tensors on disk, the way that the format's documentation says.

        Written apart from `encode`, so that the one can be held against the other.

        Args:
            tensors: by local name.
            module: whose matrix it is; a configuration may say something else for some modules.
            config: the ``quantization_config``.

        Raises:
            ModelError: tensors and configuration contradict each other.
        """

    def encoded_bytes(self, held: Held, scale_bytes: int) -> int:
        """Bytes on disk of one matrix, for the plan; scales are float16 whatever they were."""
        return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self.layout(held).values())


def halves(values: torch.Tensor, what: str, layer: str, inexact: Inexact = "refuse") -> torch.Tensor:
    """Numbers as float16.

    Args:
        values: floats of any shape.
        what: what they are, in the singular, for the message.
        layer: whose they are.
        inexact: whether a number that float16 does not hold is refused, or rounded to the nearest.

    Raises:
        PlanError: a number is not exact in float16; or, rounded, would be zero or infinite.
    """
    half = values.to(torch.float16)
    back = half.to(values.dtype)
    lost = ~torch.isfinite(half) | ((half == 0) & (values != 0))
    if bool(lost.any()):
        raise PlanError(
            f"{layer}: {what} {float(values[lost][0]):.6g} is out of float16's range",
            "leave the layer in floats (--ignore) when you quantize, or scale the model's weights",
        )
    wrong = back != values
    if inexact == "refuse" and bool(wrong.any()):
        count = int(wrong.sum())
        raise PlanError(
            f"{layer}: {count} of {values.numel()} are not exact in float16, first {what} "
            f"{float(values[wrong][0]):.9g}",
            "give --inexact round to store the nearest float16, or quantize the model from bfloat16 or "
            "float16 weights",
        )
    return half


def largest_shift(before: torch.Tensor, after: torch.Tensor) -> float:
    """The largest relative change of numbers none of which is zero; 0 where nothing was rounded."""
    exact = before.double()
    return float(((after.double() - exact) / exact).abs().max()) if before.numel() else 0.0


def one_scheme(held: Sequence[Held], name: str) -> str | None:
    """Why matrices cannot be held where a format has a single scheme for all, or ``None``."""
    groups = sorted({str(entry.scheme) for entry in held})
    return (
        f"{name} has one scheme for all layers, and they have {' and '.join(groups)}" if groups[1:] else None
    )
