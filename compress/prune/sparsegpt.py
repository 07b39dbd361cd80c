"""SparseGPT: weights become zero column after column, and the others make up for each.

Where `prune.wanda` leaves the weights that stay as they are, this one moves them: it minimises the error of
each layer's *output* on the calibration text, with the second moments of its input. A weight goes where
that costs least after all that went before it has been made up for. The gain over Wanda is small at half of
the weights and grows with the share that goes and with patterns such as 2:4; the price is a matrix of second
moments for each input and about the time of `quantize.gptq`.

Beyond the paper, and an option: when all zeros of a matrix are found, the weights that stay are fitted to
them once more, all together, by conjugate gradients (`refinement`). The walk over the columns cannot know
what goes after it; this can, and it never raises the error.

What goes is decided for a block of columns at a time (`block_size`), in whichever rows it costs least, so
rows differ in how many they lose; with a pattern for each run of neighbours. The matrices of a block are
pruned stage by stage, so each sees what was done to those before it.

The result is dense: the same shapes and precision, with zeros. They stay zero when `quantize.gptq` or
`quantize.autoround` follows.
"""

from typing import TYPE_CHECKING, ClassVar, Literal, final

from pydantic import Field

from compress.core.errors import CalibrationError
from compress.core.passes import Paper
from compress.sweep.masker import Masker, Pruned
from compress.sweep.zeros import Zeros

if TYPE_CHECKING:
    import torch

    from compress.numerics.hessian import Hessian
    from compress.numerics.statistic import Statistic


@final
class SparseGpt(Masker):
    """Prune weights and move the others."""

    summary: ClassVar[str] = "set weights to zero and let the others make up for them; shapes stay"
    paper: ClassVar[Paper | None] = Paper(
        title="SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        url="https://arxiv.org/abs/2301.00774",
        authors="Frantar, Alistarh",
        year=2023,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--sparsity 0.5 --calibration TEXT",
        "--pattern 2:4 --calibration TEXT --samples 256",
        "--sparsity 0.7 --ratios sensitivity --calibration TEXT",
    )
    calibrated: ClassVar[bool] = True
    staged: ClassVar[bool] = True

    damping: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="added to the diagonal of the second moments, relative to its mean; grows where it is "
        "too small",
    )
    block_size: int = Field(
        default=128,
        ge=1,
        description="columns whose zeros are chosen together; with a pattern only speed and memory change",
    )
    refinement: int = Field(
        default=16,
        ge=0,
        le=1000,
        description="steps of conjugate gradients that fit the other weights to the finished zeros; 0 is "
        "plain SparseGPT",
    )

    @property
    def among(self) -> Literal["matrix"]:
        """Rows of a block of columns are compared with each other."""
        return "matrix"

    @property
    def products(self) -> int:
        """The walk, two errors of the output, and the refinement with its own two."""
        return 3 + (self.refinement + 2 if self.refinement else 0)

    def statistic(self, columns: int, device: "torch.device") -> "Hessian":
        """Empty second moments."""
        from compress.numerics.hessian import Hessian

        return Hessian(columns, device)

    def prune(self, weight: "torch.Tensor", statistic: "Statistic | None", zeros: Zeros) -> Pruned:
        """Prune one float32 matrix ``[rows, columns]`` in place, and move what stays.

        Raises:
            CalibrationError: no data reached the layer, or its second moments cannot be used.
        """
        from compress.numerics.hessian import Hessian
        from compress.numerics.sparsification import sparsify

        if not isinstance(statistic, Hessian):
            raise CalibrationError(
                "SparseGPT needs the second moments of the layer's input, got "
                f"{type(statistic).__name__ if statistic is not None else 'nothing'}",
                "give calibration text",
            )
        found = sparsify(
            weight,
            statistic,
            sparsity=zeros.sparsity,
            pattern=None if zeros.pattern is None else (zeros.pattern.kept, zeros.pattern.of),
            damping=self.damping,
            block=self.block_size,
            steps=self.refinement,
        )
        notes = {
            "damping": found.damping,
            "dead_columns": found.dead_columns,
            "output_error": found.output_error,
        }
        return Pruned(found.weight, notes)
