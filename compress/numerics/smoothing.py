"""Factors that move difficulty from a layer's input into its weight, or the other way.

A linear layer computes the same when column ``j`` of its weight is multiplied by ``s_j`` and channel ``j`` of
its input is divided by it. Which factors make rounding hurt least is answered here in two ways: by a formula
from the largest values of both sides (Xiao et al. 2022, "SmoothQuant", arXiv 2211.10438, equation 4), and by
a search over powers of the input's mean magnitude (Lin et al. 2023, "AWQ", arXiv 2306.00978, section 3.2).

Columns that share a producing feature share a *channel* and so a factor: ``channels [columns]`` names it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch

from compress.core.scheme import Scheme
from compress.numerics.affine import round_to_nearest
from compress.numerics.grouping import grouped, row_chunks
from compress.numerics.hessian import Hessian
from compress.numerics.precision import full_precision
from compress.numerics.statistic import ColumnStatistic, Statistic, check_sums

_SMALLEST = 1e-5
"""Of a magnitude: below it a column counts as one that is never used, as in SmoothQuant's own code."""
_SMALLEST_SCALE = 1e-4
"""Of a factor before it is balanced, as in AWQ's own code."""
_CHUNK = 1 << 24
"""Elements of the rows whose error is computed at a time."""


@final
class Magnitudes(ColumnStatistic):
    """The largest and the mean magnitude of each input column.

    Args:
        columns: width of the layer's input.
        device: where rows are summed.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        super().__init__(columns, device)
        self._largest = torch.zeros(columns, dtype=torch.float32, device=device)
        self._sum = torch.zeros(columns, dtype=torch.float64, device=device)

    def _take(self, values: torch.Tensor) -> None:
        magnitudes = values.abs()
        self._largest = torch.maximum(self._largest, magnitudes.amax(0))
        self._sum += magnitudes.sum(0, dtype=torch.float64)

    @property
    def largest(self) -> torch.Tensor:
        """float32 ``[columns]``.

        Raises:
            CalibrationError: no token was seen, or an input was NaN or infinite.
        """
        check_sums(self.tokens, self._sum)
        return self._largest

    @property
    def mean(self) -> torch.Tensor:
        """float32 ``[columns]``.

        Raises:
            CalibrationError: no token was seen, or an input was NaN or infinite.
        """
        check_sums(self.tokens, self._sum)
        return (self._sum / self.tokens).float()


@final
class Moments(Statistic):
    """Second moments and magnitudes of an input together.

    Args:
        columns: width of the layer's input.
        device: where they are summed.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.hessian = Hessian(columns, device)
        self.magnitudes = Magnitudes(columns, device)
        self.tokens = 0

    @torch.no_grad()
    def add(self, rows: torch.Tensor) -> None:
        """Take in rows ``[tokens, columns]`` of any float dtype."""
        self.hessian.add(rows)
        self.magnitudes.add(rows)
        self.tokens += rows.shape[0]


@dataclass(frozen=True, eq=False)
class Reading:
    """Layers with one input, their weights stacked.

    Attributes:
        weight: float32 ``[rows, columns]``.
        statistic: of the input.
        channels: int64 ``[columns]``, the channel of each column.
    """

    weight: torch.Tensor
    statistic: Statistic
    channels: torch.Tensor


def smoothing_scales(readings: Sequence[Reading], count: int, strength: float) -> torch.Tensor:
    """SmoothQuant's factors ``max|X_j|^a / max|W_j|^(1-a)`` (equation 4), float64 ``[count]``.

    The weights of all readers count together. A channel that no token or no weight uses keeps its scale.

    Args:
        readings: all layers that read the channels; their statistics are `Magnitudes`.
        count: of channels.
        strength: the exponent ``a``; 0 makes weights alike, 1 makes inputs alike.

    Raises:
        CalibrationError: a statistic cannot be used.
    """
    inputs = torch.zeros(count, dtype=torch.float64)
    weights = torch.zeros(count, dtype=torch.float64)
    for reading in readings:
        if not isinstance(reading.statistic, Magnitudes):
            raise TypeError(f"smoothing needs Magnitudes, got {type(reading.statistic).__name__}")
        channels = reading.channels.cpu()
        largest = reading.statistic.largest.double().cpu()
        inputs.scatter_reduce_(0, channels, largest, "amax")
        weights.scatter_reduce_(0, channels, reading.weight.abs().amax(0).double().cpu(), "amax")
    scales = inputs.clamp_min(_SMALLEST) ** strength / weights.clamp_min(_SMALLEST) ** (1 - strength)
    used = (inputs > 0) & (weights > 0)
    return torch.where(used, scales.clamp_min(_SMALLEST), torch.ones_like(scales))


@dataclass(frozen=True, eq=False)
class Searched:
    """What a search over exponents found.

    Attributes:
        scales: float64 ``[channels]``.
        exponent: the best one; ``None`` where leaving everything as it is was better than all.
        before: error of the rounded layers' output without factors, relative to the output's energy.
        after: the same with them.
    """

    scales: torch.Tensor
    exponent: float | None
    before: float
    after: float


def search_scales(
    readings: Sequence[Reading],
    count: int,
    points: int,
    scheme: Callable[[int], Scheme],
    storage: torch.dtype,
    *,
    weigh: bool = False,
) -> Searched:
    """AWQ's factors: the power of the mean input magnitude with which rounding to nearest hurts least.

    The error is that of the readers' outputs, ``sum |(W - Q(W s) / s) X|^2 = tr(E H E^T)`` with the second
    moments ``H`` of the calibration inputs, so no input need be kept. Factors are balanced around one,
    ``s / sqrt(max s * min s)``, as in AWQ's own code. Of equal errors the first exponent stays, so factors
    are never worse than none.

    Args:
        readings: all layers that read the channels; their statistics are `Moments`.
        count: of channels.
        points: exponents ``0, 1/points, ... (points-1)/points`` are tried.
        scheme: of the rounding that will follow, for a layer with so many columns.
        storage: dtype in which its scales are stored.
        weigh: divide by the mean magnitude of the weights to the power of one less the exponent.

    Raises:
        CalibrationError: a statistic cannot be used.
        ValueError: the scheme's group does not divide the columns.
    """
    moments = [_moments(reading) for reading in readings]
    inputs = _averaged([m.magnitudes.mean for m in moments], readings, count)
    weights = None
    if weigh:
        means = [_relative_magnitude(reading.weight, scheme(reading.weight.shape[1])) for reading in readings]
        weights = _averaged(means, readings, count)
    energy = sum(_quadratic(r.weight, m.hessian) for r, m in zip(readings, moments, strict=True))
    ones = torch.ones(count, dtype=torch.float64)
    before = _rounding_error(readings, moments, ones, scheme, storage)
    best = Searched(ones, None, before, before)
    for point in range(points):
        exponent = point / points
        scales = _balanced(inputs, weights, exponent)
        error = _rounding_error(readings, moments, scales, scheme, storage)
        if error < best.after:
            best = Searched(scales, exponent, before, error)
    unit = energy if energy > 0 else 1.0
    return Searched(best.scales, best.exponent, best.before / unit, best.after / unit)


def _moments(reading: Reading) -> Moments:
    if not isinstance(reading.statistic, Moments):
        raise TypeError(f"the search needs Moments, got {type(reading.statistic).__name__}")
    reading.statistic.hessian.check()
    return reading.statistic


def _averaged(values: Sequence[torch.Tensor], readings: Sequence[Reading], count: int) -> torch.Tensor:
    """The mean over all columns of a channel, float64 ``[count]``."""
    total = torch.zeros(count, dtype=torch.float64)
    columns = torch.zeros(count, dtype=torch.float64)
    for entry, reading in zip(values, readings, strict=True):
        channels = reading.channels.cpu()
        total.index_add_(0, channels, entry.double().cpu())
        columns.index_add_(0, channels, torch.ones(len(channels), dtype=torch.float64))
    return total / columns.clamp_min(1)


def _relative_magnitude(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Mean magnitude of each column after every group was divided by its largest one, ``[columns]``."""
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in row_chunks(weight):
        values = grouped(weight[rows].abs(), scheme)
        total += (values / (values.amax(-1, keepdim=True) + 1e-6)).flatten(1).sum(0, dtype=torch.float64)
    return total / weight.shape[0]


def _balanced(inputs: torch.Tensor, weights: torch.Tensor | None, exponent: float) -> torch.Tensor:
    scales = inputs**exponent
    if weights is not None:
        scales = scales / (weights ** (1 - exponent) + _SMALLEST_SCALE)
    scales = scales.clamp_min(_SMALLEST_SCALE)
    return scales / (scales.amax() * scales.amin()).sqrt()


def _rounding_error(
    readings: Sequence[Reading],
    moments: Sequence[Moments],
    scales: torch.Tensor,
    scheme: Callable[[int], Scheme],
    storage: torch.dtype,
) -> float:
    """``tr(E H E^T)`` over all readers, with ``E = W - Q(W s) / s``."""
    total = 0.0
    for reading, moment in zip(readings, moments, strict=True):
        of_layer = scheme(reading.weight.shape[1])
        factors = scales.to(reading.weight.device)[reading.channels.to(reading.weight.device)].float()
        for rows in row_chunks(reading.weight, _CHUNK):
            weight = reading.weight[rows]
            rounded = round_to_nearest(weight * factors, of_layer, storage).dequantize().float()
            total += _quadratic(rounded.div_(factors).sub_(weight), moment.hessian)
    return total


def _quadratic(matrix: torch.Tensor, hessian: Hessian) -> float:
    """``tr(M H M^T)``."""
    total = 0.0
    with full_precision():
        for rows in row_chunks(matrix, _CHUNK):
            part = matrix[rows]
            total += float((part @ hessian.matrix).mul_(part).sum(dtype=torch.float64))
    return total
