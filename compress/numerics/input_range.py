"""The range of a layer's input, and the fixed scale with which it is rounded while the model runs."""

from typing import Final, final

import torch

from compress.core.errors import CalibrationError
from compress.core.scheme import Scheme
from compress.numerics.affine import smallest_scale
from compress.numerics.floats import E4M3_LARGEST, tensor_scale
from compress.numerics.statistic import ColumnStatistic, Statistic, check_sums

_INTEGER_LARGEST: Final = 127.0


@final
class InputRange(ColumnStatistic):
    """The largest magnitude of an input, over all its rows and columns."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        super().__init__(columns, device)
        self._largest = torch.zeros((), device=self._device)

    def _take(self, values: torch.Tensor) -> None:
        self._largest = torch.maximum(self._largest, values.abs().amax())

    @property
    def largest(self) -> float:
        """The largest magnitude seen.

        Raises:
            CalibrationError: no row was seen, or an input was NaN or infinite.
        """
        check_sums(self.tokens, self._largest)
        return float(self._largest)


@final
class Ranged(Statistic):
    """What a rounder gathers of an input, and the range of the same input beside it.

    Args:
        inner: of the rounder; ``None`` where it needs no data.
        columns: width of the input.
        device: where rows are summed.
    """

    def __init__(self, inner: Statistic | None, columns: int, device: torch.device | str = "cpu") -> None:
        self.inner = inner
        self.range = InputRange(columns, device)

    def add(self, rows: torch.Tensor) -> None:
        """Take in rows ``[tokens, columns]`` of any float dtype."""
        if self.inner is not None:
            self.inner.add(rows)
        self.range.add(rows)
        self.tokens = self.range.tokens


def input_scale(scheme: Scheme, statistic: Ranged, storage: torch.dtype) -> torch.Tensor:
    """The scale of a layer's inputs, ``[1]``, as compressed-tensors stores it.

    The largest input that calibration saw becomes the largest number there is: 127 of the integers, 448 of
    the 8-bit floats. Larger ones are cut off while the model runs. Of ``nvfp4`` it is the float32 number that
    the scales of groups are multiplied by (`compress.numerics.floats.tensor_scale`).

    Args:
        scheme: of the layer, with static activations.
        storage: the dtype in which the model holds its floats.

    Raises:
        CalibrationError: no row was seen, or inputs that are not finite or too large for the dtype.
    """
    largest = statistic.range.largest
    if scheme.format == "nvfp4":
        return torch.tensor([tensor_scale(largest)], dtype=torch.float32)
    highest = _INTEGER_LARGEST if scheme.integers else E4M3_LARGEST
    wanted = max(largest / highest, smallest_scale(storage)) if largest > 0 else 1.0
    scale = torch.tensor([wanted], dtype=torch.float64).to(storage)
    if not bool(torch.isfinite(scale).all()):
        raise CalibrationError(
            f"inputs up to {largest:.4g} have no scale in {str(storage).removeprefix('torch.')}",
            "use dynamic activations (--activations dynamic), or a bfloat16 model",
        )
    return scale
