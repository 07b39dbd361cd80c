"""Wanda: the weights of each row whose magnitude times input is smallest become zero.

The score of a weight is its magnitude times the Euclidean norm of the input that it multiplies, over the
calibration text, and it is compared with the other weights of its row alone. No weight is updated and no
matrix is inverted: one pass over little text is all that it takes. At half of the weights the paper's
LLaMA-7B goes from a perplexity of 5.68 to 7.26, where magnitude alone takes it to 17.29.

The result is dense: the same shapes and precision, with zeros. It gets neither smaller nor faster by itself.
What gains from it is hardware with 2:4 kernels (`pattern`), a file that is compressed afterwards, and methods
that train the rest. For a model that is smaller everywhere, see `prune.width`.

Blocks are pruned one after the other, each on the outputs of the pruned blocks before it, and all matrices of
a block are scored on the block as it was, as the paper does. Of equal scores the lower column goes first.
"""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, final

from pydantic import Field, field_validator, model_validator

from compress.core.facts import Fact
from compress.core.passes import Needs, Outcome, Paper, Pass
from compress.sweep.zeros import Chosen, Pattern, Zeros

if TYPE_CHECKING:
    from compress.core.artifact import Artifact
    from compress.core.run import Run

DEFAULT_SPARSITY = 0.5


@final
class Wanda(Pass):
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
    )
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS, Fact.FLOAT_WEIGHTS})
    calibrated: ClassVar[bool] = True

    sparsity: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of the weights of each row that become zero, rounded down to whole weights; 0.5 "
        "where no `pattern` is given either",
    )
    pattern: str | None = Field(
        default=None,
        description="N:M in place of a share: at most N weights that are not zero among each M neighbours "
        "of a row, such as 2:4 or 4:8",
    )
    ignore: tuple[str, ...] = Field(
        default=(), description="modules to leave whole: globs or `re:` regular expressions"
    )
    include: tuple[str, ...] = Field(
        default=(), description="linear layers outside the blocks to prune too, such as `lm_head`"
    )

    @field_validator("pattern")
    @classmethod
    def _is_a_pattern(cls, value: str | None) -> str | None:
        if value is not None:
            Pattern.parse(value)
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> "Wanda":
        if self.sparsity is not None and self.pattern is not None:
            raise ValueError("give either sparsity or pattern: a pattern says the share as well")
        return self

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse what cannot be pruned, and predict the work; see `compress.sweep.masking`."""
        from compress.sweep.masking import check

        return check(self._chosen(), source, run)

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Sweep over the blocks and prune their matrices; see `compress.sweep.masking`."""
        from compress.sweep.masking import mask

        return mask(self._chosen(), source, target, run)

    def _chosen(self) -> Chosen:
        pattern = None if self.pattern is None else Pattern.parse(self.pattern)
        share = self.sparsity if self.sparsity is not None else DEFAULT_SPARSITY
        zeros = Zeros(share if pattern is None else 1 - pattern.kept / pattern.of, pattern)
        return Chosen(zeros, self.ignore, self.include)
