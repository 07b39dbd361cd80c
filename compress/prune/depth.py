"""Depth pruning: whole blocks are taken out, those that do least first.

What is left is an ordinary model of the same class with fewer blocks: every tool that reads the original
reads it. Nothing makes a model faster so surely: time, memory and the cache of keys and values shrink
with the number of blocks, on every machine, also one token at a time, where a narrower model often gains
little. The price is quality, and it rises steeply: a quarter of the blocks is much, and a distillation
from the original should follow. For a finer cut see `prune.width`; both may follow one another.

Two ways to judge a block. Its *influence* is one minus the mean cosine of what goes in and what
comes out, read in one pass over the calibration text with one block in memory at a time. Its *loss*
is what the model's output loses without it, measured again after every block that went; that takes
the whole model in memory and many runs, and knows what the influence only guesses. Blocks go freely,
or as one run of neighbours (`--contiguous`), chosen by the angle between what goes in front of the
run and what comes out behind it, or by the loss without the run (arXiv 2403.17887).

The configuration is rewritten, with lists that have an entry for each block, and the blocks are
renumbered. Each block is run in its new place beside its old one before it is written, and both must
agree. A block that cannot move stays where it is, and the plan says so: the first one of ModernBERT,
which lacks a norm, or of T5, which has the bias of relative positions for its whole stack.

An encoder-decoder (T5, BART, T5Gemma) has two stacks of blocks, which are shortened side by side: the
share is of each, `--layers` is of each or one number for each (`--layers '[6, 3]'`), blocks are chosen
within their stack, and neighbours are a run in each. The decoder reads the same calibration text as its
encoder.

With `--repair` what stays makes up for what went, before any training: in front of every gap, and in
every block behind it, the last layer that adds to the hidden state is fitted to what the original
model has there, by ridge regression on the calibration text. That needs blocks with such a layer:
not those with a norm behind it (BERT, BART, Gemma 2 and 3), nor those of experts. A few hundred sequences
are enough; where a layer has more inputs than the text has tokens, a warning says so.
"""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, final

from pydantic import Field, PositiveInt

from compress.core.facts import Fact
from compress.core.passes import Needs, Outcome, Paper, Pass

if TYPE_CHECKING:
    from compress.core.artifact import Artifact
    from compress.core.run import Run
    from compress.sweep.shortening import Shorter


@final
class Depth(Pass):
    """Take out whole blocks."""

    summary: ClassVar[str] = "take out the blocks that do least; fewer layers, faster everywhere"
    paper: ClassVar[Paper | None] = Paper(
        title="ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
        url="https://arxiv.org/abs/2403.03853",
        authors="Men et al.",
        year=2024,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--keep 0.75 --calibration TEXT",
        "--layers 24 --contiguous --repair --calibration TEXT",
        "--layers 3 --by loss --calibration TEXT",
    )
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS, Fact.FLOAT_WEIGHTS})
    calibrated: ClassVar[bool] = True

    keep: float = Field(default=0.75, gt=0, le=1, description="share of the blocks that stays, of each stack")
    layers: PositiveInt | tuple[PositiveInt, ...] | None = Field(
        default=None,
        description="number of blocks that stay, where it is not that of `keep`; for an encoder-decoder of "
        "each stack, or a list of two",
    )
    by: Literal["influence", "loss"] = Field(
        default="influence",
        description="what tells the blocks that do least: how little they turn the hidden state "
        "(`influence`), or how little the output loses without them (`loss`, slower, with the whole model "
        "in memory)",
    )
    contiguous: bool = Field(
        default=False,
        description="take out neighbours only, as one run of blocks of each stack, chosen together",
    )
    repair: bool = Field(
        default=False,
        description="fit the last layer of each block behind the first gap to the original model's hidden "
        "states, by ridge regression",
    )
    measured_samples: PositiveInt = Field(
        default=32, description="calibration sequences that a `loss` is measured on, at most"
    )

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse what cannot be cut, and predict the work; see `compress.sweep.shortening`."""
        from compress.sweep.shortening import check

        return check(self._asked(), source, run)

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Measure the blocks and write those that stay; see `compress.sweep.shortening`."""
        from compress.sweep.shortening import shorten

        return shorten(self._asked(), source, target, run)

    def _asked(self) -> "Shorter":
        from compress.sweep.depth_stacks import Size
        from compress.sweep.shortening import Shorter

        return Shorter(
            Size(self.keep, self.layers, self.contiguous), self.by, self.repair, self.measured_samples
        )
