"""Width pruning: whole MLP channels, attention heads and channels of the hidden state are taken out.

What is left is an ordinary, smaller model of the same class: every tool that reads the original reads it,
and it is smaller and faster everywhere, without a special kernel. The price is quality: whole channels are
a coarser cut than single weights, and a distillation from the original should follow, as it does in the
paper. For zeros that keep the shape and cost less, see `prune.wanda`.

By `activation` a channel counts by the mean of what it carries over the tokens of a sequence, in the root of
the sum of squares over sequences; a head likewise by the norm of its output, a channel of the hidden state by
what norms make of it, summed over all norms. By `taylor` all of them count by activation times gradient of
the loss, by `magnitude` by the norm of their weights. Which rows and columns of which weights belong together
is found from the model itself, so fused gates and fused queries, keys and values need no table of names.
Each block chooses its own channels and heads; how many stay is one number for all blocks, because
configuration classes have one. Before a block is written it is run beside the wide block with the same
channels at zero, and both must agree.

Query heads that share a key-value head go as whole groups, or evenly from every group: whichever gives the
number nearest to the one asked for that the configuration class accepts. Many older classes (GPT-2, OPT,
GPT-NeoX, BERT, DistilBERT) cannot say that a model has fewer heads of the same width: their heads stay, and
the report says so.

The hidden size (`--hidden`) is one number for the model, and its channels are the same everywhere: rows of
embeddings and of what writes the hidden state, columns of what reads it, entries of norms. A norm then takes
its statistic over the channels that stay: that is what the smaller model computes, and what the wide one it
is held against computes too. In the older classes above the hidden size is that of all heads together, so
there it goes with heads, where both are asked for (`--hidden 0.75 --heads 0.75`). Models that multiply by a
number that follows from the hidden size (Gemma's embeddings) are refused. The cut is a hard one: without
`--repair` and a distillation the smaller model may say little.

With `--budget` the shares are found by a search: MLP channels, heads, the hidden size, by channels or by
components (`prune.slice`), and whole blocks (`prune.depth`) in many mixtures, each cut until it keeps to the
budget, made, and measured on the text. The best of them is the result, so on that text no method alone is
better. The lineage has the table. A share and a number of parameters count what is inside the blocks, and by
components a head that shared the embedding's weight gets one of its own: where that weight is much of the
model, give the budget in bytes. A speed is predicted from the bytes that are read for a token;
`compress bench` measures it. Small models gain less than that from width, because a narrower layer is as many
calls: of 4 million parameters, half of the MLP channels (predicted: 1.60 times) decode 1.17 times as fast in
torch and 1.28 times on ONNX Runtime, and half of the blocks, likewise 1.60, 1.63 and 1.57 times
(`benchmarks/structured_pruning.py --speed`).

With `--repair` the layers that read what went are fitted again, before any training: what the channels and
heads that go gave to their outputs is regressed on those that stay, and their biases take what is constant of
it. That costs one more sum a layer in the same pass over the text, and no layer gets worse on it. A few
hundred sequences are enough; where a layer keeps more inputs than the text has tokens, a warning says so.
"""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Literal, final

from pydantic import Field, PositiveInt, field_validator, model_validator

from compress.core.budget import SizeBudget
from compress.core.facts import Fact
from compress.core.passes import Needs, Outcome, Paper, Pass

if TYPE_CHECKING:
    from compress.core.artifact import Artifact
    from compress.core.run import Run
    from compress.sweep.narrow_plan import Asked
    from compress.sweep.narrowing import How
    from compress.sweep.width_budget import Spent

KEPT: Final = 0.75
"""The share of channels and heads that stays where nobody says another one."""


@final
class Width(Pass):
    """Take out MLP channels, attention heads and channels of the hidden state."""

    summary: ClassVar[str] = (
        "take out the least important MLP channels, heads and hidden channels; faster everywhere"
    )
    paper: ClassVar[Paper | None] = Paper(
        title="Compact Language Models via Pruning and Knowledge Distillation",
        url="https://arxiv.org/abs/2407.14679",
        authors="Muralidharan et al.",
        year=2024,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--keep 0.75 --calibration TEXT",
        "--mlp 0.5 --heads 1 --multiple 128 --calibration TEXT --samples 512",
        "--keep 1 --hidden 0.75 --importance taylor --calibration TEXT",
        "--budget 50% --repair --calibration TEXT",
        "--budget 1.5x --multiple 64 --calibration TEXT",
    )
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS, Fact.FLOAT_WEIGHTS})
    calibrated: ClassVar[bool] = True

    keep: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the MLP channels and of the heads that stays; without a budget 0.75",
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
    key_value_groups: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the key-value groups, which go with their query heads; `heads` beside it is "
        "then a share of all query heads",
    )
    hidden: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the channels of the hidden state, which embeddings, norms and every layer lose "
        "alike; `--keep 1` beside it leaves the rest, and without a budget all of them stay",
    )
    importance: Literal["activation", "taylor", "magnitude"] = Field(
        default="activation",
        description="what channels and heads count by: what they carry (`activation`), what the loss changes "
        "without them to first order (`taylor`, with the whole model and gradients in memory), or the norm "
        "of their weights (`magnitude`)",
    )
    multiple: PositiveInt | Literal["auto"] = Field(
        default="auto",
        description="round the MLP channels and the hidden size that stay to a multiple of this; `auto` "
        "takes the largest of 128, 64, 32, 16 and 8 that divides the width now and moves the number by at "
        "most 2% of it",
    )
    repair: bool = Field(
        default=False,
        description="fit the layers that read what went to their outputs before the cut, by ridge regression",
    )
    budget: str | None = Field(
        default=None,
        description="in place of shares: what the model may take, spread over MLP channels, heads, the "
        "hidden size and blocks by a search that measures. Parameters inside the blocks, as a share of what "
        "they are now (`50%`) or as their number (`1_500_000`), bytes of all tensors on disk (`500MB`), or "
        "the predicted speed of decoding that has to be reached (`1.5x`)",
    )
    trials: PositiveInt = Field(
        default=32, description="models that the search for a budget makes and measures, at most"
    )
    measured_samples: PositiveInt = Field(
        default=32, description="calibration sequences that their loss is measured on, at most"
    )

    @field_validator("budget")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        if value is not None:
            SizeBudget.parse(value)
        return value

    @model_validator(mode="after")
    def _one_way(self) -> "Width":
        shares = ("keep", "mlp", "heads", "key_value_groups", "hidden")
        given = [name for name in shares if getattr(self, name) is not None]
        if self.budget is not None and given:
            raise ValueError(f"a budget finds the shares itself: leave {' and '.join(given)} out")
        return self

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse what cannot be cut, and predict the work; see `compress.sweep.narrowing`."""
        if self.budget is not None:
            from compress.sweep import width_budget

            return width_budget.check(self._spent(self.budget), self._how(), source, run)
        from compress.sweep.narrowing import check

        return check(self._asked(), self._how(), source, run)

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Cut channels and heads block by block; see `compress.sweep.narrowing`."""
        if self.budget is not None:
            from compress.sweep import width_budget

            return width_budget.fit(self._spent(self.budget), self._how(), source, target, run)
        from compress.sweep.narrowing import narrow

        return narrow(self._asked(), self._how(), source, target, run)

    def _how(self) -> "How":
        from compress.sweep.narrowing import How

        return How(self.importance, self.repair)

    def _spent(self, budget: str) -> "Spent":
        from compress.sweep.width_budget import Spent

        multiple = None if self.multiple == "auto" else self.multiple
        return Spent(SizeBudget.parse(budget), self.trials, self.measured_samples, multiple)

    def _asked(self) -> "Asked":
        from compress.sweep.narrow_plan import Asked, Axis

        insists: set[Axis] = set()
        if self.mlp is not None:
            insists.add("channels")
        if self.heads is not None or self.key_value_groups is not None:
            insists.add("heads")
        keep = KEPT if self.keep is None else self.keep
        with_groups = keep if self.key_value_groups is None else self.key_value_groups
        return Asked(
            keep if self.mlp is None else self.mlp,
            with_groups if self.heads is None else self.heads,
            None if self.multiple == "auto" else self.multiple,
            frozenset(insists),
            1.0 if self.hidden is None else self.hidden,
            self.key_value_groups,
        )
