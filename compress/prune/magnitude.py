"""Magnitude pruning: the smallest weights become zero.

The oldest criterion and the cheapest: it reads no text, runs no model and streams over the weights once, or
three times where they are compared over the whole model. What it does not know is the input that a weight
multiplies, and language models have input channels that are a hundred times as large as others: at half of
the weights `prune.wanda`, which looks at them, loses a fraction of what magnitude loses, in one pass over
little text. So take this one as the baseline that others have to beat, before a long training that brings
back what was lost, or where there is no text.

Weights are compared within their matrix, within their row, or over all matrices of the model (`scope`). The
last gives every layer a share of its own: those with small weights lose more, and some can lose nearly
everything, which is said when it happens.

The result is dense: the same shapes and precision, with zeros. Of equal magnitudes the first ones go, row
after row and matrix after matrix.
"""

from typing import TYPE_CHECKING, ClassVar, Literal, Self, final

from pydantic import Field, model_validator

from compress.core.passes import Paper
from compress.sweep.masker import Masker, Pruned
from compress.sweep.zeros import Zeros

if TYPE_CHECKING:
    import torch

    from compress.numerics.statistic import Statistic

Scope = Literal["row", "matrix", "model"]


@final
class Magnitude(Masker):
    """Prune the smallest weights."""

    summary: ClassVar[str] = "set the smallest weights to zero; needs no data"
    paper: ClassVar[Paper | None] = Paper(
        title="Learning both Weights and Connections for Efficient Neural Networks",
        url="https://arxiv.org/abs/1506.02626",
        authors="Han, Pool, Tran, Dally",
        year=2015,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--sparsity 0.3",
        "--sparsity 0.3 --scope model",
        "--pattern 2:4 --ignore *.down_proj",
    )
    scored_by_input: ClassVar[bool] = False

    scope: Scope | None = Field(
        default=None,
        description="which weights are compared with each other: those of a `row`, of a `matrix`, or of the "
        "whole `model` with one threshold for all of it; those of a matrix where nothing is given",
    )

    @model_validator(mode="after")
    def _scope_fits(self) -> Self:
        if self.scope is not None and self.pattern is not None:
            raise ValueError("a pattern compares neighbours: leave scope out")
        if self.scope == "model" and self.ratios != "uniform":
            raise ValueError("scope model finds the shares of layers itself: leave ratios out")
        return self

    @property
    def among(self) -> Scope:
        """As it was asked for."""
        return "matrix" if self.scope is None else self.scope

    @property
    def products(self) -> Literal[0]:
        """Inputs are not looked at."""
        return 0

    def statistic(self, columns: int, device: "torch.device") -> None:
        """Nothing."""

    def prune(self, weight: "torch.Tensor", statistic: "Statistic | None", zeros: Zeros) -> Pruned:
        """Set the smallest of float32 ``[rows, columns]`` to zero, in place."""
        from compress.sweep.scores import staying

        return Pruned(weight.masked_fill_(~staying(weight.abs(), zeros), 0))
