"""Round to nearest: every weight goes to the closest level of its group, without data.

The baseline of every other rounder, and at 8 bits usually all that is needed. It costs one pass over the
weights. Where 4 bits hurt, a method that sees data (`quantize.gptq`) recovers most of the loss.

It rounds to every format. `--format fp8` and 8-bit integers with `--activations dynamic` are what servers
multiply fastest: inputs are rounded too while the model runs, with a scale for each token. A fixed scale
(`--activations static`) saves finding it, and comes from calibration text; inputs beyond what the text
showed are cut off. `nvfp4` and `mxfp4` are the 4-bit floats of newer hardware. With integers, outliers of the
inputs hurt: `quantize.smoothquant` moves them into the weights first.
"""

from typing import TYPE_CHECKING, ClassVar, Literal, final

from pydantic import Field

from compress.core.passes import Paper
from compress.core.scheme import Format, Range, Scheme
from compress.sweep.rounder import Rounded, Rounder

if TYPE_CHECKING:
    import torch

    from compress.numerics.statistic import Statistic


@final
class Rtn(Rounder):
    """Round to nearest."""

    summary: ClassVar[str] = "round every weight to the nearest level; needs no data"
    paper: ClassVar[Paper | None] = Paper(
        title="Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        url="https://arxiv.org/abs/1712.05877",
        authors="Jacob et al.",
        year=2018,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--bits 8 --group-size channel",
        "--bits 4 --group-size 32 --clip mse",
        "--format fp8 --activations dynamic",
        "--bits 8 --group-size channel --activations static --calibration TEXT",
    )

    formats: ClassVar[tuple[Format, ...]] = ("int", "fp8", "nvfp4", "mxfp4")

    integer_range: Range = Field(
        default="full",
        description="integers of a symmetric scheme: `full` uses all of them; `narrow` leaves out the lowest "
        "one, so that the largest weight is held exactly and the steps are wider",
    )
    clip: Literal["none", "mse"] = Field(
        default="none",
        description="range of a group: `none` takes its extremes, `mse` the one with the least squared error",
    )

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
        from compress.numerics.floats import round_to_floats

        del statistic
        search = ClipSearch() if self.clip == "mse" else None
        if not scheme.integers:
            return Rounded(round_to_floats(weight, scheme, storage, search=search))
        return Rounded(round_to_nearest(weight, scheme, storage, search=search))
