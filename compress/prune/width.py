"""Width pruning: whole MLP channels and attention heads are taken out, the least active ones first.

What is left is an ordinary, smaller model of the same class: every tool that reads the original reads it,
and it is smaller and faster everywhere, without a special kernel. The price is quality: whole channels are
a coarser cut than single weights, and a distillation from the original should follow, as it does in the
paper. For zeros that keep the shape and cost less, see `prune.wanda`.

A channel counts by the mean of its activations over the tokens of a sequence, in the root of the sum of
squares over sequences; a head likewise by the norm of its output. Both are read from the calibration text
in one pass over the model as it was. Which rows and columns of which weights belong to a channel or a head
is found from the model itself, so fused gates and fused queries, keys and values need no table of names.
Each block chooses its own channels; how many stay is one number for all blocks, because configuration
classes have one. Before a block is written it is run beside the wide block with the same channels at zero,
and both must agree.

Query heads that share a key-value head go as whole groups, or evenly from every group: whichever gives the
number nearest to the one asked for that the configuration class accepts. Many older classes (GPT-2, OPT,
GPT-NeoX, BERT, DistilBERT) cannot say that a model has fewer heads of the same width: their heads stay, and
the report says so. The hidden size is not cut.

With `--repair` the layers that read what went are fitted again, before any training: what the channels and
heads that go gave to their outputs is regressed on those that stay, and their biases take what is constant of
it. That costs one more sum a layer in the same pass over the text, and no layer gets worse on it. A few
hundred sequences are enough; where a layer keeps more inputs than the text has tokens, a warning says so.
"""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, final

from pydantic import Field, PositiveInt

from compress.core.facts import Fact
from compress.core.passes import Needs, Outcome, Paper, Pass

if TYPE_CHECKING:
    from compress.core.artifact import Artifact
    from compress.core.run import Run
    from compress.sweep.narrow_plan import Asked


@final
class Width(Pass):
    """Take out MLP channels and attention heads."""

    summary: ClassVar[str] = "take out the least active MLP channels and heads; smaller and faster everywhere"
    paper: ClassVar[Paper | None] = Paper(
        title="Compact Language Models via Pruning and Knowledge Distillation",
        url="https://arxiv.org/abs/2407.14679",
        authors="Muralidharan et al.",
        year=2024,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--keep 0.75 --calibration TEXT",
        "--mlp 0.5 --heads 1 --multiple 128 --calibration TEXT --samples 512",
        "--keep 0.75 --repair --calibration TEXT",
    )
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS, Fact.FLOAT_WEIGHTS})
    calibrated: ClassVar[bool] = True

    keep: float = Field(
        default=0.75, gt=0, le=1, description="share of the MLP channels and of the heads that stays"
    )
    mlp: float | None = Field(
        default=None, gt=0, le=1, description="share of the MLP channels, where it is not that of `keep`"
    )
    heads: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the query heads, where it is not that of `keep`; 1 leaves attention whole. A "
        "share given here is refused where the model cannot lose heads; `keep` leaves them and says so",
    )
    multiple: PositiveInt | Literal["auto"] = Field(
        default="auto",
        description="round the MLP channels that stay to a multiple of this; `auto` takes the largest of "
        "128, 64, 32, 16 and 8 that divides the width now and moves the number by at most 2% of it",
    )
    repair: bool = Field(
        default=False,
        description="fit the layers that read what went to their outputs before the cut, by ridge regression",
    )

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse what cannot be cut, and predict the work; see `compress.sweep.narrowing`."""
        from compress.sweep.narrowing import check

        return check(self._asked(), source, run, repair=self.repair)

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Cut channels and heads block by block; see `compress.sweep.narrowing`."""
        from compress.sweep.narrowing import narrow

        return narrow(self._asked(), source, target, run, repair=self.repair)

    def _asked(self) -> "Asked":
        from compress.models.channels import Kind
        from compress.sweep.narrow_plan import Asked

        insists: set[Kind] = set()
        if self.mlp is not None:
            insists.add("channels")
        if self.heads is not None:
            insists.add("heads")
        return Asked(
            self.keep if self.mlp is None else self.mlp,
            self.keep if self.heads is None else self.heads,
            None if self.multiple == "auto" else self.multiple,
            frozenset(insists),
        )
