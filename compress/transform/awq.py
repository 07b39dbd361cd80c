"""AWQ: weights that multiply large activations are made larger before they are rounded.

A weight that is held in few bits has an error that does not depend on its size but on its group's. The few
columns that meet the largest activations matter most, so they are multiplied by `s_j > 1` (and their input
divided by it): their error shrinks by the same factor, while the group's scale hardly grows. The factor is a
power of the channel's mean magnitude, and the power is searched for: `grid` exponents are tried, and the one
with which the readers' outputs differ least under plain rounding is taken. The error is computed from second
moments of the calibration inputs, `tr(E H E^T)`, not from stored activations.

The options `bits`, `group_size`, `symmetric` and `integer_range` say which rounding will follow, and should
be those of the rounder after it: `transform.awq` then `quantize.rtn` is the AWQ of the paper. The result is
an ordinary float model that computes the same up to the rounding of its own precision. Factors go into norms
and into linear layers whose features reach the input by products alone (value to output projection, also
where heads share values; what is gated to what narrows); where that is is found from the model itself, and
what cannot be served is left alone and named with the reason.

The paper also clips weights. A clipped model no longer computes the same, and the range is the rounder's to
search: use `quantize.rtn --clip mse` or `quantize.gptq`, which search it in the error that they cause.
Against `quantize.gptq`, rounding to nearest after AWQ depends less on the calibration text and costs no error
feedback; it is usually a little less exact at 3 and 4 bits.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, final

from pydantic import Field, PositiveInt, field_validator

from compress.core.passes import Paper
from compress.core.scheme import Range, Scheme
from compress.sweep.folding_pass import Producers, Smoother, Solved
from compress.sweep.rounder import GroupSize

if TYPE_CHECKING:
    import torch

    from compress.numerics.smoothing import Moments, Reading


@final
class Awq(Smoother):
    """Scale up the weights that matter."""

    summary: ClassVar[str] = (
        "scale up weights that meet large activations, searched for the rounding to follow"
    )
    paper: ClassVar[Paper | None] = Paper(
        title="AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
        url="https://arxiv.org/abs/2306.00978",
        authors="Lin et al.",
        year=2023,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--bits 4 --group-size 128 --calibration TEXT",
        "--bits 3 --group-size 64 --no-symmetric --grid 40 --calibration TEXT",
    )

    bits: Literal[2, 3, 4, 8] = Field(default=4, description="bits of the rounding that will follow")
    group_size: GroupSize = Field(
        default=128, description="its input columns that share a scale, or `channel` for one scale a row"
    )
    symmetric: bool = Field(default=True, description="whether its zero is the integer 0")
    integer_range: Range = Field(
        default="full",
        description="its integers where it is symmetric: `full` uses all of them, as rounders do unless told "
        "otherwise; `narrow` leaves out the lowest",
    )
    grid: PositiveInt = Field(default=20, description="exponents from 0 to below 1 that are tried")
    balance: Literal["activations", "both"] = Field(
        default="activations",
        description="what a factor is a power of: `activations` as in the paper, or `both`: divided by the "
        "mean magnitude of the weights to one less the power, as in later implementations",
    )
    producers: Producers = Field(
        default="all",
        description="what takes the factors: norms and linear layers, or `norms` alone",
    )
    fallback: Literal["refuse", "channel"] = Field(
        default="refuse",
        description="a layer whose width the group does not divide: refuse the plan, or one scale a row",
    )

    @field_validator("group_size")
    @classmethod
    def _positive(cls, value: GroupSize) -> GroupSize:
        if value != "channel" and value < 1:
            raise ValueError("must be a positive number of columns or 'channel'")
        return value

    @property
    def into(self) -> Producers:
        """What may take a factor."""
        return self.producers

    @property
    def tried(self) -> int:
        """Once without factors and once for each exponent."""
        return self.grid + 1

    def refusal(self, columns: int) -> str:
        """Why a layer with so many input columns cannot be rounded as the options say."""
        if self.group_size == "channel" or self.fallback == "channel" or columns % self.group_size == 0:
            return ""
        return f"has {columns} columns, which groups of {self.group_size} do not divide"

    def statistic(self, columns: int, device: "torch.device") -> "Moments":
        """Empty moments."""
        from compress.numerics.smoothing import Moments

        return Moments(columns, device)

    def solve(self, readings: "Sequence[Reading]", count: int, storage: "torch.dtype") -> Solved:
        """The factors of one fold with the least error under rounding.

        Raises:
            CalibrationError: no data reached a layer, or its inputs are not finite.
        """
        from compress.numerics.smoothing import search_scales

        found = search_scales(readings, count, self.grid, self._scheme, storage, weigh=self.balance == "both")
        notes: dict[str, float | int | str] = {
            "exponent": "none" if found.exponent is None else f"{found.exponent:.6g}",
            "error_before": found.before,
            "error_after": found.after,
        }
        return Solved(found.scales, notes)

    def _scheme(self, columns: int) -> Scheme:
        """Of the rounding that will follow for a layer with so many columns."""
        group = None if self.group_size == "channel" or columns % self.group_size else self.group_size
        return Scheme(self.bits, group, self.symmetric, self.integer_range)
