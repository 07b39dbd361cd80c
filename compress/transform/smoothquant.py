"""SmoothQuant: outliers of the activations are divided into the norm before them.

Some channels of a transformer's hidden state are up to a hundred times larger than the others, for every
token. Eight bits for a whole token are then spent on them. Each channel is divided by `max|X_j|^alpha /
max|W_j|^(1 - alpha)` and the columns that read it are multiplied by the same, so that both sides share the
difficulty. Prepares a model for 8-bit weights *and activations*; for weights alone, `transform.awq` looks at
the error itself.

The result is an ordinary float model that computes the same up to the rounding of its own precision: factors
go into the weight of the norm, and where asked for (`producers: all`) into the rows of a linear layer before
(the value projection, what a gate multiplies). Where they can go is found from the model itself, so a
parallel block, a fused projection, a shared value head or a norm that adds one to its weight need no table of
names. Layers whose input nothing can take a factor from (what follows a GELU, a norm after the residual sum)
are left alone and named with the reason.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, final

from pydantic import Field

from compress.core.passes import Paper
from compress.sweep.folding_pass import Producers, Smoother, Solved

if TYPE_CHECKING:
    import torch

    from compress.numerics.smoothing import Magnitudes, Reading


@final
class SmoothQuant(Smoother):
    """Share outliers between activations and weights."""

    summary: ClassVar[str] = (
        "divide outliers of activations into the layers around; the model computes the same"
    )
    paper: ClassVar[Paper | None] = Paper(
        title="SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
        url="https://arxiv.org/abs/2211.10438",
        authors="Xiao et al.",
        year=2022,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--calibration TEXT",
        "--alpha 0.75 --producers all --calibration TEXT --samples 256",
    )

    alpha: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="how much of the difficulty moves from activations to weights: 0 makes the largest "
        "weights of all columns alike, 1 the largest activations",
    )
    producers: Producers = Field(
        default="norms",
        description="what takes the factors: `norms` alone, as in the paper, or `all`: linear layers too "
        "whose features reach the input by products alone",
    )

    @property
    def into(self) -> Producers:
        """What may take a factor."""
        return self.producers

    @property
    def tried(self) -> int:
        """A formula: no error is computed."""
        return 0

    def refusal(self, columns: int) -> str:
        """Every width can be served."""
        return ""

    def statistic(self, columns: int, device: "torch.device") -> "Magnitudes":
        """Empty magnitudes."""
        from compress.numerics.smoothing import Magnitudes

        return Magnitudes(columns, device)

    def solve(self, readings: "Sequence[Reading]", count: int, storage: "torch.dtype") -> Solved:
        """The factors of one fold by the paper's formula.

        Raises:
            CalibrationError: no data reached a layer, or its inputs are not finite.
        """
        from compress.numerics.smoothing import smoothing_scales

        return Solved(smoothing_scales(readings, count, self.alpha))
