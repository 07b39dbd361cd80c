"""Round to nearest: every weight goes to the closest level of its group, without data.

The baseline of every other rounder, and at 8 bits usually all that is needed. It costs one pass over the
weights. Where 4 bits hurt, a method that sees data (`quantize.gptq`) recovers most of the loss.
"""

from typing import TYPE_CHECKING, ClassVar, Literal, final

from pydantic import Field

from compress.core.passes import Paper
from compress.core.scheme import Range, Scheme
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
    )

    integer_range: Range = Field(
        default="narrow",
        description="integers of a symmetric scheme: `narrow` leaves out the lowest one, so that the largest "
        "weight is held exactly; `full` uses all of them",
    )
    clip: Literal["none", "mse"] = Field(
        default="none",
        description="range of a group: `none` takes its extremes, `mse` the one with the least squared error",
    )

    @property
    def range(self) -> Range:
        """The integer range of a symmetric scheme."""
        return self.integer_range

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

        del statistic
        search = ClipSearch() if self.clip == "mse" else None
        return Rounded(round_to_nearest(weight, scheme, storage, search=search))
