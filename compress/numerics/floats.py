"""Small floats: E4M3 and E2M1 with scales, how they are chosen, and what their readers make of them.

Rounding is to nearest, ties to the even mantissa, and saturates. Layouts and arithmetic are those of the
compressed-tensors format, so that a loader gets exactly the values that were meant:

- ``fp8``: E4M3 (finite, largest 448) with one scale a row (Micikevicius et al. 2022, "FP8 Formats for Deep
  Learning", arXiv 2209.05433).
- ``nvfp4``: E2M1 (largest 6) in groups of 16. The scale of a group is an E4M3 number relative to one float32
  number for the matrix, chosen so that the largest weight has the largest scale.
- ``mxfp4``: E2M1 in groups of 32 whose scale is a power of two, stored as its exponent (OCP Microscaling
  Formats, version 1.0). The exponent is rounded up from seven eighths of the way, where fewer values than
  with the specification's own example are cut off; compressed-tensors does the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch

from compress.core.errors import ModelError
from compress.core.scheme import Scheme
from compress.numerics.affine import ClipSearch, smallest_scale
from compress.numerics.grouping import check_groups, grouped, row_chunks

E4M3: Final = torch.float8_e4m3fn
E4M3_LARGEST: Final = 448.0
_E4M3_SMALLEST: Final = 2.0**-9
E2M1_LARGEST: Final = 6.0
E2M1_VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the codes 0 to 7 stand for; the eighth bit of a nibble, 8, is the sign."""
_MIDDLES: Final = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_BIAS: Final = 127
"""Of an E8M0 exponent: the code 127 is the scale 1. 255 is not a number."""


def to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """The nearest E4M3 numbers, ties to even; what is larger than 448 becomes 448."""
    return values.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(E4M3)


def to_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Codes (uint8, 0 to 15) of the nearest E2M1 numbers, ties to even; beyond 6 they are 6.

    A negative value that rounds to zero keeps its sign, as in the reference library.
    """
    size = values.abs()
    codes = torch.zeros_like(size, dtype=torch.uint8)
    for index, middle in enumerate(_MIDDLES):
        # Of two neighbours the one with an even code takes the middle between them.
        codes += (size >= middle if index % 2 else size > middle).to(torch.uint8)
    return codes | ((values < 0).to(torch.uint8) << 3)


def from_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """The float32 numbers that codes stand for."""
    table = torch.tensor(E2M1_VALUES + tuple(-value for value in E2M1_VALUES), device=codes.device)
    return table[codes.long()]


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte ``[rows, columns / 2]``, the first in the low half."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Codes ``[rows, columns]`` back from bytes."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)


def tensor_scale(largest: float) -> float:
    """The float32 number that the scales of an ``nvfp4`` matrix are multiplied by.

    With it the group of the largest number gets the largest scale there is.

    Args:
        largest: magnitude of the largest number; of several matrices that one kernel multiplies with at
            once, the largest of all.
    """
    if largest <= 0:
        return 1.0
    found = torch.tensor(E4M3_LARGEST * E2M1_LARGEST, dtype=torch.float32) / largest
    return float(found.clamp(max=torch.finfo(torch.float32).max))


@dataclass(frozen=True)
class QuantizedFloats:
    """A matrix as small floats: what the float formats are written from.

    Attributes:
        codes: float8_e4m3fn ``[rows, columns]``, or codes of E2M1 numbers, uint8 of the same shape.
        scale: ``[rows, groups]``: of ``fp8`` in the dtype in which it will be stored, of ``nvfp4``
            float8_e4m3fn, of ``mxfp4`` exponents as uint8.
        scheme: the format; of ``nvfp4`` with its ``tensor_scale``.
        storage: the dtype in which weights come back.

    Raises:
        ValueError: shapes or dtypes contradict each other or the scheme.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    scheme: Scheme
    storage: torch.dtype

    def __post_init__(self) -> None:
        codes = {"fp8": E4M3, "nvfp4": torch.uint8, "mxfp4": torch.uint8}.get(self.scheme.format)
        scales = {"fp8": self.storage, "nvfp4": E4M3, "mxfp4": torch.uint8}.get(self.scheme.format)
        if codes is None:
            raise ValueError(f"{self.scheme} holds no floats")
        if self.codes.ndim != 2 or self.codes.dtype != codes:
            raise ValueError(f"codes must be {codes} [rows, columns], got {self.codes.dtype}")
        check_groups(self.codes.shape[1], self.scheme)
        expected = (self.codes.shape[0], self.scheme.groups(self.codes.shape[1]))
        if tuple(self.scale.shape) != expected or self.scale.dtype != scales:
            raise ValueError(
                f"scale must be {scales} {list(expected)}, got {self.scale.dtype} {list(self.scale.shape)}"
            )
        if self.scheme.format == "nvfp4" and self.scheme.tensor_scale is None:
            raise ValueError("nvfp4 needs the scale of the whole matrix")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> torch.Tensor:
        """The matrix ``[rows, columns]`` in the storage dtype, with the arithmetic of its readers.

        Bit for bit what ``compressed_tensors`` computes while loading: 8-bit floats are multiplied in the
        dtype of their scale; 4-bit ones come back in bfloat16 whatever the model's dtype is, and are cast.
        """
        if self.scheme.format == "fp8":
            return self.codes.to(self.storage) * self.scale
        values = grouped(from_e2m1(self.codes), self.scheme)
        products = (values * _float_scale(self.scale, self.scheme).unsqueeze(-1)).flatten(1)
        return products.to(torch.bfloat16).to(self.storage)

    def rows(self, start: int, stop: int) -> "QuantizedFloats":
        """The rows from ``start`` up to ``stop``, as views."""
        return QuantizedFloats(self.codes[start:stop], self.scale[start:stop], self.scheme, self.storage)

    def parts(self) -> dict[str, torch.Tensor]:
        """What is written of it, with the rows in front."""
        return {"q": self.codes, "scale": self.scale}

    def check_values(self) -> None:
        """Hold every number and scale against the format.

        Raises:
            ValueError: a code that is none or not a number, a scale that is zero or not finite.
        """
        if self.scheme.format == "fp8" and bool(self.codes.float().isnan().any()):
            raise ValueError("a number is NaN")
        if self.scheme.format != "fp8" and self.codes.numel() and int(self.codes.max()) > 15:
            raise ValueError(f"codes reach {int(self.codes.max())}, 4-bit floats have 16")
        # The exponent 255 is not a number.
        wrong = self.scale == 255 if self.scheme.format == "mxfp4" else ~(self.scale.float() > 0)
        if bool(wrong.any()) or not bool(torch.isfinite(_float_scale(self.scale, self.scheme)).all()):
            raise ValueError("a scale is zero or not finite")

    @classmethod
    def of(cls, parts: Mapping[str, torch.Tensor], scheme: Scheme, storage: torch.dtype) -> "QuantizedFloats":
        """A matrix back from its parts."""
        return cls(parts["q"], parts["scale"], scheme, storage)


def round_to_floats(
    weight: torch.Tensor, scheme: Scheme, storage: torch.dtype, *, search: ClipSearch | None = None
) -> QuantizedFloats:
    """Choose the scale of every group and round to the nearest float.

    Without a search the largest number of a group gets the largest float, as far as the scale's own
    precision goes; with one, of several smaller ranges the one with the least squared error. Groups of
    zeros get the scale 1.

    Args:
        weight: float ``[rows, columns]``; not changed.
        scheme: a float format. ``nvfp4`` without a ``tensor_scale`` gets that of this matrix.
        storage: dtype in which the model holds its floats: that of an ``fp8`` scale.
        search: the shrink factors to try; of ``mxfp4``, whose scales are powers of two, whether to try the
            neighbours of the exponent.

    Raises:
        ModelError: the weight holds NaN or infinite values.
    """
    check_groups(weight.shape[1], scheme)
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(
            f"{int((~torch.isfinite(weight)).sum())} weights of the matrix are NaN or infinite",
            "restore the model from a sound checkpoint",
        )
    if scheme.format == "nvfp4" and scheme.tensor_scale is None:
        scheme = _with_tensor_scale(scheme, weight)
    codes = torch.empty(
        weight.shape, dtype=E4M3 if scheme.format == "fp8" else torch.uint8, device=weight.device
    )
    scale = torch.empty(
        weight.shape[0],
        scheme.groups(weight.shape[1]),
        dtype={"fp8": storage, "nvfp4": E4M3}.get(scheme.format, torch.uint8),
        device=weight.device,
    )
    for rows in row_chunks(weight):
        values = grouped(weight[rows].float(), scheme)
        chosen = _chosen(values, scheme, storage, search)
        scale[rows] = chosen
        quotients = values / _float_scale(chosen, scheme).unsqueeze(-1)
        codes[rows] = _rounded(quotients, scheme).flatten(1)
    return QuantizedFloats(codes, scale, scheme, storage)


def _with_tensor_scale(scheme: Scheme, weight: torch.Tensor) -> Scheme:
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    return replace(scheme, tensor_scale=tensor_scale(largest))


def _rounded(quotients: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    return to_e4m3(quotients) if scheme.format == "fp8" else to_e2m1(quotients)


def _float_scale(scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Stored scales as the float32 numbers that codes are multiplied by."""
    if scheme.format == "mxfp4":
        return torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - _BIAS)
    if scheme.format == "nvfp4":
        whole = torch.tensor(scheme.tensor_scale, dtype=torch.float32, device=scale.device)
        return scale.float() / whole
    return scale.float()


def _chosen(
    values: torch.Tensor, scheme: Scheme, storage: torch.dtype, search: ClipSearch | None
) -> torch.Tensor:
    """Scales ``[rows, groups]`` as they are stored, for ``values [rows, groups, width]``."""
    largest = values.abs().amax(-1)
    best = _stored(largest, scheme, storage)
    if search is None:
        return best
    if scheme.format == "mxfp4":
        moved = (best.int() + step for step in (-1, 1))
        candidates = [exponent.clamp(0, 2 * _BIAS).to(torch.uint8) for exponent in moved]
    else:
        candidates = [_stored(largest * factor, scheme, storage) for factor in search.factors()]
    least = _error(values, best, scheme)
    for candidate in candidates:
        error = _error(values, candidate, scheme)
        better = (error < least) & (largest > 0)
        least = torch.where(better, error, least)
        # torch selects among 8-bit floats by their bits.
        chosen = torch.where(better, _bits(candidate), _bits(best))
        best = chosen.view(best.dtype)
    return best


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == E4M3 else tensor


def _error(values: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Squared error of rounding each group, ``[rows, groups]``."""
    step = _float_scale(scale, scheme).unsqueeze(-1)
    codes = _rounded(values / step, scheme)
    back = codes.float() if scheme.format == "fp8" else from_e2m1(codes)
    return back.mul_(step).sub_(values).square_().sum(-1)


def _stored(largest: torch.Tensor, scheme: Scheme, storage: torch.dtype) -> torch.Tensor:
    """The scale with which the largest number of a group is the largest float, as it is stored."""
    if scheme.format == "mxfp4":
        fraction, exponent = torch.frexp(largest)
        # The largest is fraction * 2^exponent with a fraction of at least one half; 6 lies below 2^3.
        exponent = exponent - 3 + (fraction >= 0.875).int()
        stored = (exponent + _BIAS).clamp(0, 2 * _BIAS)
        return torch.where(largest > 0, stored, _BIAS).to(torch.uint8)
    if scheme.format == "nvfp4":
        whole = torch.tensor(scheme.tensor_scale, dtype=torch.float32, device=largest.device)
        wanted = (largest / E2M1_LARGEST * whole).clamp(_E4M3_SMALLEST, E4M3_LARGEST)
        return to_e4m3(torch.where(largest > 0, wanted, 1.0))
    room = torch.finfo(storage).max / E4M3_LARGEST * (1 - 2.0**-7)
    wanted = (largest / E4M3_LARGEST).clamp(smallest_scale(storage), room)
    return torch.where(largest > 0, wanted, 1.0).to(storage)
