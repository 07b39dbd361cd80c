"""GPTQ: round column after column, each column's error made up for by those that follow.

The method of choice for 4 bits and below. It minimises the error of each layer's *output* on the
calibration text, where `quantize.rtn` minimises that of its weights. Beyond the paper, and each an option:

- the range of a group is searched in the metric of the layer's output, not taken from its extremes
  (`clip`; as in the first stage of Lee et al. 2026, arXiv 2602.02126, but for errors that the feedback
  makes up for), with either sign of the scale (`signed_scales`; as GGUF's Q4_0 does);
- columns are rounded in order of decreasing importance while groups stay where they are, so that a
  reader needs no index of groups (`activation_order`);
- scales and integers are refined afterwards by coordinate descent (`refinement`; the second stage of
  arXiv 2602.02126, and QuantEase, arXiv 2309.01885);
- weights that pruning has set to zero stay zero, and the errors that would have moved them are made up for
  by the others (`keep_zeros`; section 3.5 of SparseGPT, arXiv 2301.00774, joins the two likewise).
"""

from typing import TYPE_CHECKING, ClassVar, Literal, final

from pydantic import Field

from compress.core.errors import CalibrationError
from compress.core.passes import Paper
from compress.core.scheme import Scheme
from compress.sweep.rounder import IntegerRange, KeepZeros, Rounded, Rounder, SignedScales

if TYPE_CHECKING:
    import torch

    from compress.numerics.hessian import Hessian
    from compress.numerics.statistic import Statistic


@final
class Gptq(Rounder):
    """Round with error feedback."""

    summary: ClassVar[str] = "round with error feedback from calibration data; for 4 bits and below"
    paper: ClassVar[Paper | None] = Paper(
        title="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        url="https://arxiv.org/abs/2210.17323",
        authors="Frantar, Ashkboos, Hoefler, Alistarh",
        year=2023,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--bits 4 --group-size 128 --calibration TEXT",
        "--bits 3 --group-size 64 --calibration TEXT --samples 256 --sequence-length 1024",
    )
    calibrated: ClassVar[bool] = True

    damping: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="added to the Hessian's diagonal, relative to its mean; grows where it is too small",
    )
    activation_order: Literal["static", "none"] = Field(
        default="static",
        description="order of rounding: `static` takes the columns with the largest inputs first and leaves "
        "groups in place, `none` goes from left to right",
    )
    clip: Literal["none", "mse", "hessian"] = Field(
        default="hessian",
        description="range of a group: `none` takes its extremes, `mse` the one with the least squared error "
        "of the weights, `hessian` the one with the least error of the layer's output",
    )
    integer_range: IntegerRange = "full"
    signed_scales: SignedScales = True
    refinement: int = Field(
        default=2,
        ge=0,
        le=100,
        description="sweeps of coordinate descent over scales and integers after rounding; each takes twice "
        "as long as the rounding, most of the gain is in the first two, and 0 is the quickest",
    )
    keep_zeros: KeepZeros = True
    block_size: int = Field(
        default=32, ge=1, description="columns between two large updates; changes speed and memory only"
    )

    def statistic(self, columns: int, device: "torch.device") -> "Hessian":
        """An empty Hessian."""
        from compress.numerics.hessian import Hessian

        return Hessian(columns, device)

    def round(
        self,
        weight: "torch.Tensor",
        statistic: "Statistic | None",
        scheme: Scheme,
        storage: "torch.dtype",
    ) -> Rounded:
        """Round one float32 matrix ``[rows, columns]``, overwriting the weights of dead columns with zero.

        Raises:
            CalibrationError: no data reached the layer, or its Hessian cannot be used.
            ModelError: the weight holds NaN or infinite values.
        """
        from compress.numerics.affine import round_to_nearest
        from compress.numerics.feedback import Ranges, output_error, solve
        from compress.numerics.hessian import Hessian

        ranges = Ranges(self.clip, self.signed_scales)
        if statistic is None:
            # An embedding: rows are looked up, so errors of its columns do not add up and nothing can make
            # up for them. With the identity for a Hessian, GPTQ is rounding to nearest.
            return Rounded(round_to_nearest(weight, scheme, storage, search=ranges.search))
        if not isinstance(statistic, Hessian):
            raise CalibrationError(
                f"GPTQ needs the Hessian of the layer's input, got {type(statistic).__name__}",
                "give calibration text",
            )
        solution = solve(
            weight,
            statistic,
            scheme,
            storage,
            ranges=ranges,
            damping=self.damping,
            order=self.activation_order,
            sweeps=self.refinement,
            block=self.block_size,
            keep_zeros=self.keep_zeros,
        )
        notes = {
            "damping": solution.damping,
            "dead_columns": solution.dead_columns,
            "output_error": output_error(weight, solution.quantized, statistic),
        }
        return Rounded(solution.quantized, notes)
