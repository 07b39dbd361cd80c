"""Slicing: the residual stream is rotated to its principal components, and the least of them are cut off.

The hidden size of a model gets smaller, and every matrix that reads or writes the hidden state with it. What
is left is an ordinary model of the same class with the same blocks, heads and MLP channels: it is smaller and
faster everywhere, and so is its head, which `prune.width` leaves whole. The price is quality; a
distillation from the original should follow.

A rotation of the residual stream changes nothing that a model computes (`transform.rotate`). The rotation
here is that of a principal component analysis of what the layers read on the calibration text, each token
with the same weight. Its last components carry least and are cut off. The weights of norms go into the layers
behind them; a norm that takes a mean over fewer channels finds the same, because the stream is scaled to
make up for it. SliceGPT gives each layer a rotation of its own and puts a matrix between them into
the model; an ordinary checkpoint has no place for that, so one rotation serves the whole stream, which
costs quality for the same size and needs no code to load.

Who reads and writes the stream is found from the model itself. Layer norms are kept as they are: the
components are those without the mean, and they are laid into channels whose mean is zero (Phi, Cohere). A
head that shares the embedding's weight gets one of its own, as the norm in front of it goes into the head
alone. Refused with the reason: classes whose heads are as wide as the hidden size says (GPT-2, OPT,
GPT-NeoX), a norm behind a layer or behind the sum (Gemma 2 and 3, BERT), routers, fused experts, and models
with two stacks, of which the second reads what the first hands on.

Each narrow block is run beside the wide one, whose writes are projected onto the components, before it is
written, and both must agree. With `--repair` what is left is then fitted to the original model by ridge
regression, block after block: how layers see each norm, and the last layer of a block that adds to the
stream. That takes several more passes over the text, no training, and is worth it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, final

from pydantic import Field, PositiveInt

from compress.core.facts import Fact
from compress.core.passes import Needs, Outcome, Paper, Pass

if TYPE_CHECKING:
    from compress.core.artifact import Artifact
    from compress.core.run import Run
    from compress.sweep.slicing import Sliced


@final
class Slice(Pass):
    """Cut the hidden size down to its principal components."""

    summary: ClassVar[str] = "cut the hidden size to its principal components; smaller and faster everywhere"
    paper: ClassVar[Paper | None] = Paper(
        title="SliceGPT: Compress Large Language Models by Deleting Rows and Columns",
        url="https://arxiv.org/abs/2401.15024",
        authors="Ashkboos et al.",
        year=2024,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--keep 0.75 --calibration TEXT",
        "--keep 0.8 --multiple 128 --repair --calibration TEXT",
    )
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS, Fact.FLOAT_WEIGHTS})
    calibrated: ClassVar[bool] = True

    keep: float = Field(default=0.75, gt=0, le=1, description="share of the hidden size that stays")
    multiple: PositiveInt | Literal["auto"] = Field(
        default="auto",
        description="round the hidden size to a multiple of this; `auto` takes the largest of 128, 64, 32, "
        "16 and 8 that divides it now and moves the number by at most 2% of it",
    )
    repair: bool = Field(
        default=False,
        description="fit what reads and writes the narrow stream to the original model, by ridge regression",
    )

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse what cannot be sliced, and predict the work; see `compress.sweep.slicing`."""
        from compress.sweep.slicing import check

        return check(self._asked(), source, run)

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Find the components and slice block by block; see `compress.sweep.slicing`."""
        from compress.sweep.slicing import slice_stream

        return slice_stream(self._asked(), source, target, run)

    def _asked(self) -> "Sliced":
        from compress.sweep.slice_plan import Width
        from compress.sweep.slicing import Sliced

        return Sliced(Width(self.keep, None if self.multiple == "auto" else self.multiple), self.repair)
