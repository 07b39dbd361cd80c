"""Wanda: the weights of each row whose magnitude times input is smallest become zero.

The score of a weight is its magnitude times the Euclidean norm of the input that it multiplies, over the
calibration text, and it is compared with the other weights of its row alone. No weight is updated and no
matrix is inverted: one pass over little text is all that it takes. At half of the weights the paper's
LLaMA-7B goes from a perplexity of 5.68 to 7.26, where magnitude alone takes it to 17.29. Where more than
half goes, shares that differ from layer to layer serve better (`ratios`).

The result is dense: the same shapes and precision, with zeros. It gets neither smaller nor faster by itself.
What gains from it is hardware with 2:4 kernels (`pattern`), a file that is compressed afterwards, and methods
that train the rest. `prune.sparsegpt` moves the weights that stay, which costs more time and loses less. For
a model that is smaller everywhere, see `prune.width`.

Blocks are pruned one after the other, each on the outputs of the pruned blocks before it, and all matrices of
a block are scored on the block as it was, as the paper does. Of equal scores the lower column goes first.
"""

from typing import TYPE_CHECKING, ClassVar, Literal, final

from compress.core.passes import Paper
from compress.sweep.masker import Masker, Pruned
from compress.sweep.zeros import Zeros

if TYPE_CHECKING:
    import torch

    from compress.numerics.statistic import Statistic


@final
class Wanda(Masker):
    """Prune weights by magnitude and activation."""

    summary: ClassVar[str] = "set the weights that matter least to zero; shapes stay as they are"
    paper: ClassVar[Paper | None] = Paper(
        title="A Simple and Effective Pruning Approach for Large Language Models",
        url="https://arxiv.org/abs/2306.11695",
        authors="Sun, Liu, Bair, Kolter",
        year=2023,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--sparsity 0.5 --calibration TEXT",
        "--pattern 2:4 --calibration TEXT --samples 256",
        "--sparsity 0.7 --ratios outliers --calibration TEXT",
    )
    calibrated: ClassVar[bool] = True

    @property
    def among(self) -> Literal["row"]:
        """Rows are compared with nothing but themselves."""
        return "row"

    @property
    def products(self) -> Literal[0]:
        """Norms of inputs are all that is gathered."""
        return 0

    def statistic(self, columns: int, device: "torch.device") -> "Statistic":
        """The norm of each input column."""
        from compress.numerics.masks import ColumnNorms

        return ColumnNorms(columns, device)

    def prune(self, weight: "torch.Tensor", statistic: "Statistic | None", zeros: Zeros) -> Pruned:
        """Set the lowest scores of float32 ``[rows, columns]`` to zero, in place.

        Raises:
            CalibrationError: nothing is known of the input, or it was not finite.
        """
        from compress.sweep.scores import by_input, staying

        return Pruned(weight.masked_fill_(~staying(by_input(weight, statistic), zeros), 0))
