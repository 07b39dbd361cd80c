"""HQQ: fit the grid of each group so that few errors are large and most are small, without data.

A little more work than `quantize.rtn` and no calibration text: for each group the scale and the zero
point are fitted to the weights in a norm below one, which lets a few outliers go for the sake of the
others, and of all grids that the fit meets the one with the least squared error is kept. Where no text is at
hand, or a model has layers that it would not reach, this is the method to try first below 8 bits; with text,
`quantize.gptq` is better.

Zero points here are whole numbers and scales have the precision of the model, so that every server reads
the result; the original keeps real zero points in 16 bits, which only its own kernels take. How the fit
makes up for that, and what else differs, is said in `compress.numerics.half_quadratic`. On request the fit
begins with ranges that were searched in the same norm, too (`clip`), since it only finds the nearest optimum.
"""

from typing import TYPE_CHECKING, ClassVar, Literal, final

from pydantic import Field

from compress.core.passes import Paper
from compress.core.scheme import Scheme
from compress.sweep.rounder import IntegerRange, Rounded, Rounder, SignedScales

if TYPE_CHECKING:
    import torch

    from compress.numerics.statistic import Statistic


@final
class Hqq(Rounder):
    """Round on a grid that was fitted by half-quadratic splitting."""

    summary: ClassVar[str] = "fit each group's grid in a norm that forgives outliers; needs no data"
    paper: ClassVar[Paper | None] = Paper(
        title="Half-Quadratic Quantization of Large Machine Learning Models",
        url="https://mobiusml.github.io/hqq_blog/",
        authors="Badri, Shaji",
        year=2023,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--bits 4 --group-size 64 --no-symmetric",
        "--bits 3 --group-size 64 --norm 0.9",
    )

    norm: float = Field(
        default=0.7,
        gt=0,
        le=1,
        description="exponent of the errors that are summed; the smaller, the less outliers count",
    )
    beta: float = Field(
        default=10.0,
        gt=0,
        description="weight of the split; errors above beta^(1 / (norm - 2)) steps of the grid are outliers",
    )
    growth: float = Field(default=1.01, ge=1, le=10, description="factor of beta from turn to turn")
    turns: int = Field(
        default=20, ge=0, le=1000, description="how often outliers are split off and the grid fitted"
    )
    clip: Literal["none", "norm"] = Field(
        default="none",
        description="ranges to begin with: `none` takes the extremes of a group as the original does, `norm` "
        "also the ones with the least error in the norm",
    )
    integer_range: IntegerRange = "full"
    signed_scales: SignedScales = True

    def statistic(self, columns: int, device: "torch.device") -> None:
        """No data is needed."""

    def round(
        self,
        weight: "torch.Tensor",
        statistic: "Statistic | None",
        scheme: Scheme,
        storage: "torch.dtype",
    ) -> Rounded:
        """Round one float32 matrix ``[rows, columns]``; the statistic is not looked at.

        Raises:
            ModelError: the weight holds NaN or infinite values.
        """
        from compress.numerics.affine import ClipSearch, round_to_nearest
        from compress.numerics.half_quadratic import HalfQuadratic, fit

        del statistic
        starts = [round_to_nearest(weight, scheme, storage)]
        if self.clip == "norm":
            search = ClipSearch(exponent=self.norm, signed=self.signed_scales)
            starts.append(round_to_nearest(weight, scheme, storage, search=search))
        return Rounded(fit(weight, starts, HalfQuadratic(self.norm, self.beta, self.growth, self.turns)))
