"""A student of another shape: fewer layers, narrower ones, begun with the teacher's weights.

The first half of a distillation into a model of a size that is given. What comes out is an ordinary
checkpoint of the same class, which predicts badly until `distill.logits` has trained it (`teacher: $model` in
a recipe). To keep as much as possible of what a model can do at moderate cuts, prune it by what its channels
do on a text (`prune.width`); for a far smaller model, where little of that survives, a shape is all that
counts.

Layers are chosen evenly, with the first and the last, as for DistilBERT. Of a narrower hidden state and of
narrower MLPs every n-th channel is kept, the same ones wherever they are written and read, embeddings and
norms included. Heads stay as many and, where the configuration class has a field for it, as wide. `weights:
fresh` draws the weights instead, as the class does for a new model; without a smaller shape that is a model
of the same size from scratch, which tells what a pruning was worth.
"""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, final

from pydantic import Field

from compress.core.facts import Fact
from compress.core.passes import Needs, Outcome, Paper, Pass

if TYPE_CHECKING:
    from compress.core.artifact import Artifact
    from compress.core.run import Run
    from compress.sweep.reshaping import Wanted


@final
class Student(Pass):
    """Make a smaller model of the same class from a teacher's weights."""

    summary: ClassVar[str] = "a model of another shape, begun with a teacher's layers; distil it afterwards"
    paper: ClassVar[Paper | None] = Paper(
        title="DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter",
        url="https://arxiv.org/abs/1910.01108",
        authors="Sanh, Debut, Chaumond, Wolf",
        year=2019,
    )
    examples: ClassVar[tuple[str, ...]] = ("--layers 4 --hidden 256", "--layers 6 --weights fresh")
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS, Fact.FLOAT_WEIGHTS})

    layers: int | None = Field(default=None, ge=1, description="blocks of the student; none keeps them all")
    hidden: int | None = Field(
        default=None, ge=1, description="width of its hidden state; none keeps that of the teacher"
    )
    mlp: int | None = Field(
        default=None,
        ge=1,
        description="channels of each MLP; none keeps the number, or the ratio where the class derives it",
    )
    weights: Literal["teacher", "fresh"] = Field(
        default="teacher",
        description="`teacher` takes layers and channels of the teacher, `fresh` draws new weights",
    )

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse a shape that the model's class cannot have, and predict the work."""
        from compress.sweep.reshaping import check

        return check(self._wanted(), source, run)

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Write the student; see `compress.sweep.reshaping`."""
        from compress.sweep.reshaping import reshape

        return reshape(self._wanted(), source, target, run)

    def _wanted(self) -> "Wanted":
        from compress.sweep.reshaping import Wanted

        return Wanted(self.layers, self.hidden, self.mlp, self.weights)
