"""Uniform affine quantization of a matrix: integers, scales, zero points, and how they are chosen.

One convention throughout, that of the compressed-tensors format: a weight is ``(q - zero) * scale`` with
*signed* integers, also for asymmetric schemes (Jacob et al. 2018, "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference", arXiv 1712.05877, equation 1). Scales are
rounded to the dtype in which they are stored *before* the integers are chosen; so the integers are the
best ones for the numbers that a loader will see, not for numbers that nobody stores.
"""

from dataclasses import dataclass, field

import torch

from compress.core.errors import ModelError
from compress.core.scheme import Scheme
from compress.numerics.grouping import (
    CHUNK_ELEMENTS,
    check_groups,
    group_width,
    grouped,
    row_chunks,
)

_TILE = 1 << 16
"""Weights whose ranges are searched together: a copy and its errors stay in the cache of one core."""
_LEAST_ROWS = 128

_HEADROOM = 1 - 2.0**-7
"""Keeps the largest level below the largest number of the storage dtype, rounding of the scale included."""


@dataclass(frozen=True)
class Quantized:
    """A matrix as integers: what every format is written from.

    Attributes:
        q: int8 ``[rows, columns]``, signed, within ``[scheme.lowest, scheme.highest]``.
        scale: ``[rows, groups]`` in the dtype in which it will be stored; finite, never zero.
        zero: int8 ``[rows, groups]`` in the same range as ``q``; ``None`` for a symmetric scheme.
        scheme: bits, group, symmetry and range.

    Raises:
        ValueError: shapes or dtypes contradict each other or the scheme.
    """

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    scheme: Scheme

    def __post_init__(self) -> None:
        if self.q.ndim != 2 or self.q.dtype != torch.int8:
            raise ValueError(f"q must be int8 [rows, columns], got {_describe(self.q)}")
        check_groups(self.columns, self.scheme)
        expected = (self.q.shape[0], self.scheme.groups(self.columns))
        if tuple(self.scale.shape) != expected or not self.scale.is_floating_point():
            raise ValueError(f"scale must be a float {list(expected)}, got {_describe(self.scale)}")
        if self.scheme.symmetric != (self.zero is None):
            raise ValueError(f"{self.scheme} takes {'no' if self.scheme.symmetric else 'a'} zero point")
        if self.zero is not None and (tuple(self.zero.shape) != expected or self.zero.dtype != torch.int8):
            raise ValueError(f"zero must be int8 {list(expected)}, got {_describe(self.zero)}")

    @property
    def columns(self) -> int:
        """Columns of the matrix: input features of a linear layer."""
        return self.q.shape[1]

    @property
    def groups(self) -> int:
        """Scales in one row."""
        return self.scale.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.q.shape[0], self.q.shape[1]

    @property
    def storage(self) -> torch.dtype:
        """The dtype in which scales are stored and weights come back."""
        return self.scale.dtype

    def dequantize(self) -> torch.Tensor:
        """The matrix ``[rows, columns]`` in the scale's dtype, with the arithmetic of its readers.

        Bit for bit what ``compressed_tensors`` computes while loading: integers and zero points are cast
        to the scale's dtype (exact below 256 also in bfloat16), subtracted and multiplied there.
        """
        values = grouped(self.q.to(self.scale.dtype), self.scheme)
        if self.zero is not None:
            values = values - self.zero.to(self.scale.dtype).unsqueeze(-1)
        return (values * self.scale.unsqueeze(-1)).flatten(1)

    def parts(self) -> dict[str, torch.Tensor]:
        """What is written of it, with the rows in front."""
        parts = {"q": self.q, "scale": self.scale}
        return parts if self.zero is None else {**parts, "zero": self.zero}

    def rows(self, start: int, stop: int) -> "Quantized":
        """The rows from ``start`` up to ``stop``, as views: one layer out of several that were stacked."""
        zero = None if self.zero is None else self.zero[start:stop]
        return Quantized(self.q[start:stop], self.scale[start:stop], zero, self.scheme)

    def check_values(self) -> None:
        """Hold every integer and scale against the scheme.

        Raises:
            ValueError: an integer or zero point out of range, a scale that is zero or not finite.
        """
        for name, integers in (("q", self.q), ("zero", self.zero)):
            if integers is None or integers.numel() == 0:
                continue
            low, high = (int(bound) for bound in integers.aminmax())
            if low < self.scheme.lowest or high > self.scheme.highest:
                allowed = f"[{self.scheme.lowest}, {self.scheme.highest}]"
                raise ValueError(f"{name} spans [{low}, {high}], {self.scheme} allows {allowed}")
        if not bool((torch.isfinite(self.scale) & (self.scale != 0)).all()):
            raise ValueError("a scale is zero or not finite")


@dataclass(frozen=True)
class ClipSearch:
    """Where to look for a range smaller than the extremes of a group.

    Attributes:
        points: how many shrink factors are tried, the factor 1 included.
        smallest: the smallest factor.
        exponent: of the absolute error that is summed, where the columns do not interact; 2 is the
            squared error, GPTQ's reference code uses 2.4.
        signed: try negative scales too, where the range has one more negative integer than positive
            ones. A group whose largest weight is positive is then held with its lowest integer, as in
            GGUF's Q4_0. Every reader multiplies by the scale, so the sign costs nothing.
    """

    points: int = 41
    smallest: float = 0.2
    exponent: float = 2.0
    signed: bool = False

    def factors(self) -> list[float]:
        """The shrink factors, from 1 downwards; a tie keeps the larger range."""
        if self.points < 2:
            return [1.0]
        step = (1.0 - self.smallest) / (self.points - 1)
        return [1.0 - index * step for index in range(self.points)]

    def signs(self, scheme: Scheme) -> tuple[int, ...]:
        """The signs of the scale to try."""
        return (1, -1) if self.signed and scheme.symmetric and scheme.range == "full" else (1,)


@dataclass(frozen=True)
class _Extremes:
    """Lowest and highest value of each group, zero included."""

    low: torch.Tensor
    high: torch.Tensor
    largest: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "largest", torch.maximum(-self.low, self.high))


def choose_scales(
    weight: torch.Tensor,
    scheme: Scheme,
    storage: torch.dtype,
    *,
    search: ClipSearch | None = None,
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Choose the scale and zero point of every group.

    Without a search the range of a group is that of its values (zero included); with one, the range that
    minimises the error of rounding among shrunk ones. A group of zeros gets the scale 1, so that it comes
    back as zeros and whatever error compensation adds to it later is rounded away.

    Args:
        weight: float ``[rows, columns]``; not changed.
        scheme: bits, group, symmetry and range.
        storage: dtype of the scales.
        search: the shrink factors to try, or ``None`` for the extremes themselves.
        importance: how errors count in the search: ``None`` all columns alike; ``[columns]``, not
            negative, a weight for each column, such as the diagonal of a Hessian; ``[groups, width,
            width]`` the Hessian of each group.

    Returns:
        scale ``[rows, groups]`` in ``storage``, and zero point int8 ``[rows, groups]`` or ``None``.

    Raises:
        ModelError: the weight holds NaN or infinite values.
    """
    check_groups(weight.shape[1], scheme)
    groups = scheme.groups(weight.shape[1])
    scale = torch.empty(weight.shape[0], groups, dtype=storage, device=weight.device)
    zero = None if scheme.symmetric else torch.empty_like(scale, dtype=torch.int8)
    elements = CHUNK_ELEMENTS if search is None else weight.shape[1] * _search_rows(weight.shape[1], scheme)
    for rows in row_chunks(weight, elements):
        if search is None:
            extremes = _extremes(grouped(weight[rows].float(), scheme), 2)
            chosen = _range_to_grid(extremes, 1.0, scheme, storage)
        else:
            chosen = _search(weight[rows], scheme, storage, search, importance)
        scale[rows] = chosen[0]
        if zero is not None and chosen[1] is not None:
            zero[rows] = chosen[1]
    return scale, zero


def quantize(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """The nearest integers, ties to even: int8 ``[rows, columns]``.

    The quotient is computed in float32 with the scale as it is stored. ``scale`` and ``zero`` have shape
    ``[rows, groups]``.
    """
    check_groups(weight.shape[1], scheme)
    q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in row_chunks(weight):
        levels = _nearest(
            grouped(weight[rows].float(), scheme),
            scale[rows].float().unsqueeze(-1),
            None if zero is None else zero[rows].float().unsqueeze(-1),
            scheme,
        )
        q[rows] = levels.flatten(1).to(torch.int8)
    return q


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def round_to_nearest(
    weight: torch.Tensor,
    scheme: Scheme,
    storage: torch.dtype,
    *,
    search: ClipSearch | None = None,
    importance: torch.Tensor | None = None,
) -> Quantized:
    """Choose scales and round: `choose_scales` and `quantize` in one step."""
    scale, zero = choose_scales(weight, scheme, storage, search=search, importance=importance)
    return Quantized(quantize(weight, scale, zero, scheme), scale, zero, scheme)


def smallest_scale(storage: torch.dtype) -> float:
    """The smallest scale that may be stored.

    Subnormal numbers are allowed in float16, where small weights need them and processors keep them; in
    bfloat16 and float32 they lie below any real weight and are often flushed to zero.
    """
    return 2.0**-24 if storage == torch.float16 else torch.finfo(storage).smallest_normal


def _nearest(
    values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """Integers as floats; the operands broadcast."""
    levels = torch.div(values, scale).round_()
    if zero is not None:
        levels.add_(zero)
    return levels.clamp_(scheme.lowest, scheme.highest)


def _extremes(values: torch.Tensor, dimension: int) -> _Extremes:
    low, high = values.aminmax(dim=dimension)
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        count = int((~torch.isfinite(values)).sum())
        raise ModelError(
            f"{count} weights of the matrix are NaN or infinite", "restore the model from a sound checkpoint"
        )
    return _Extremes(low.clamp_(max=0), high.clamp_(min=0))


def _range_to_grid(
    extremes: _Extremes, factor: float, scheme: Scheme, storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point for extremes shrunk by a factor."""
    if scheme.symmetric:
        divisor = scheme.highest if scheme.range == "narrow" else scheme.steps / 2
        return _stored(extremes.largest * factor / divisor, extremes, -scheme.lowest, storage), None
    width = (extremes.high - extremes.low) * factor / scheme.steps
    scale = _stored(width, extremes, scheme.steps, storage)
    offset = (extremes.low * factor).div_(scale.float()).round_()
    zero = torch.sub(scheme.lowest, offset).clamp_(scheme.lowest, scheme.highest)
    return scale, zero.to(torch.int8)


def _stored(scale: torch.Tensor, extremes: _Extremes, levels: int, storage: torch.dtype) -> torch.Tensor:
    """Scales rounded to the storage dtype: finite, never zero, and no level beyond the largest number."""
    bounded = scale.clamp(smallest_scale(storage), torch.finfo(storage).max / levels * _HEADROOM).to(storage)
    return torch.where(extremes.largest == 0, torch.ones_like(bounded), bounded)


def _search_rows(columns: int, scheme: Scheme) -> int:
    """Rows of one tile of the search: a few hundred, so that steps over a column cost little."""
    return max(_LEAST_ROWS, _TILE // group_width(columns, scheme))


def _search(
    weight: torch.Tensor,
    scheme: Scheme,
    storage: torch.dtype,
    search: ClipSearch,
    importance: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The best of the shrunk ranges of some rows, ``[rows, groups]``.

    A column is contiguous while it is worked on, so that the scales of all rows meet it at once.
    """
    groups, width = scheme.groups(weight.shape[1]), group_width(weight.shape[1], scheme)
    values = weight.float().T.contiguous().view(groups, width, -1)
    together = max(1, _TILE // (width * weight.shape[0]))
    found = []
    for start in range(0, groups, together):
        part = slice(start, start + together)
        if importance is None:
            found.append(_best_range(values[part], scheme, storage, search, None))
            continue
        # Of one number a column: a matrix of one row.
        own = importance if importance.ndim == 3 else importance.view(groups, 1, width)
        found.append(_best_range(values[part], scheme, storage, search, own[part]))
    zero = [chosen for _, chosen in found if chosen is not None]
    return torch.cat([scale for scale, _ in found]).T, torch.cat(zero).T if zero else None


def _best_range(
    values: torch.Tensor,
    scheme: Scheme,
    storage: torch.dtype,
    search: ClipSearch,
    importance: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point ``[groups, rows]`` of ``values [groups, width, rows]``."""
    extremes = _extremes(values, 1)
    best_scale, best_zero = _range_to_grid(extremes, 1.0, scheme, storage)
    least = torch.full_like(extremes.low, torch.inf)
    rounded, error = torch.empty_like(values), torch.empty_like(values)
    for factor in search.factors():
        positive, zero = _range_to_grid(extremes, factor, scheme, storage)
        step = positive.float().unsqueeze(1)
        offset = None if zero is None else zero.float().unsqueeze(1)
        torch.div(values, step, out=rounded).round_()
        if offset is not None:
            rounded.add_(offset)
        for sign in search.signs(scheme):
            # With a negative scale the same number is reached by the opposite integer.
            bounds = sorted((sign * scheme.lowest, sign * scheme.highest))
            torch.clamp(rounded, *bounds, out=error)
            if offset is not None:
                error.sub_(offset)
            lost = _lost(error.mul_(step).sub_(values), search.exponent, importance)
            better = lost < least
            least = torch.where(better, lost, least)
            best_scale = torch.where(better, positive * sign, best_scale)
            if zero is not None and best_zero is not None:
                best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _lost(error: torch.Tensor, exponent: float, importance: torch.Tensor | None) -> torch.Tensor:
    """What errors ``[groups, width, rows]``, which are overwritten, cost: ``[groups, rows]``."""
    if importance is not None and importance.shape[1] > 1:
        return torch.bmm(importance, error).mul_(error).sum(1)
    error = error.square_() if exponent == 2.0 else error.abs_().pow_(exponent)
    return error.sum(1) if importance is None else torch.bmm(importance, error).squeeze(1)
