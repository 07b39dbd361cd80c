"""Distillation of next-token distributions: a student learns to say what its teacher says of every position.

The way to win back what pruning took, and, with a text that is like what will be served, to fit a smaller
model to it. A distribution says of each position more than the one token that came next, so that a few
million tokens go a long way; cross-entropy alone needs many more, and pulls a student away from its teacher
towards the text.

The loss is a weighted sum (`loss`): the forward divergence KL(teacher || student), which covers all that the
teacher says; the reverse one, which leaves out what the student cannot say; the generalised Jensen-Shannon
divergence between them (`beta`); the total variation; and plain cross-entropy on the text. Distributions are
softened by a temperature, and divergences are multiplied by its square (section 2 of the paper). The loss of
the validation text is measured without it. `compress.training.csv` has the forward divergence and the
cross-entropy in any case, as `divergence` and `cross_entropy`.

Any artifact can teach, a quantized one too: it is run as the bench would run it. It must have the student's
vocabulary, since probabilities are compared token by token. Its logits are computed as it is asked, and
never stored: for a vocabulary of 150,000 a million tokens of them would be 600 GB. What can be stored, once
and for every later run, is its most likely tokens, the sum of all others, and a few drawn from these
(`compress teacher cache`, `cache`). The student's tokens are then put together in the same way; the forward
divergence learns from the drawn ones what is inside the sum, so that on average it is that over the whole
vocabulary, and the other divergences leave the proportions inside it to the student. Windows are those of
the cache.

A student that is stored as integers (compressed-tensors or GPTQ) is trained on its own grid: each pass
multiplies with the rounded weights that a reader of the artifact sees, gradients go straight through the
rounding to floats behind them (Bengio et al. 2013, https://arxiv.org/abs/1308.3432), and the result has the
same format, bits and groups. Its `scales` can be trained too; `origin` starts from the float weights.

What is trained is all float weights, in float32, without dropout; they are saved in the precision that they
had. Zeros that pruning left in a matrix stay zero (`zeros`). Windows of the text hold documents one after
the other with an end of text between, and no padding. The best weights on the validation text are kept, and
a run that was killed goes on from its last checkpoint to the same bytes, on the same kind of device with the
same number of threads. `compress.training.csv` in the result has one row a step.
"""

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

from pydantic import Field, field_validator, model_validator

from compress.core.passes import Paper
from compress.numerics.criterion import Criterion, Term
from compress.training.distiller import Distiller

if TYPE_CHECKING:
    from compress.training.head import Halves
    from compress.training.imitation import Teacher
    from compress.training.objective import Objective
    from compress.training.precision import Arithmetic


@final
class Logits(Distiller):
    """Learn a teacher's next-token distributions."""

    summary: ClassVar[str] = "train the model to predict what a teacher predicts; wins back what pruning took"
    paper: ClassVar[Paper | None] = Paper(
        title="Distilling the Knowledge in a Neural Network",
        url="https://arxiv.org/abs/1503.02531",
        authors="Hinton, Vinyals, Dean",
        year=2015,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--teacher TEACHER --train TEXT --tokens 5_000_000",
        "--teacher TEACHER --train TEXT --temperature 2 --loss forward_kl=0.9,cross_entropy=0.1",
        "--teacher TEACHER --train TEXT --loss jensen_shannon=1 --beta 0.1",
        "--teacher TEACHER --train TEXT --cache CACHE",
    )
    other_folders: ClassVar[tuple[str, ...]] = ("cache",)

    loss: dict[Term, float] = Field(
        default={"forward_kl": 1.0},
        min_length=1,
        description="what is minimised, terms with weights: `forward_kl`, `reverse_kl`, `jensen_shannon`, "
        "`total_variation` and `cross_entropy`, as in `forward_kl=0.7,cross_entropy=0.3`",
    )
    beta: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of the teacher in the mixture of `jensen_shannon`: near 0 it is like the forward "
        "divergence, near 1 like the reverse one, and at both ends it is that divergence",
    )
    temperature: float = Field(
        default=1.0, gt=0, description="what both models' logits are divided by; above 1 small chances count"
    )
    cache: str | None = Field(
        default=None,
        min_length=1,
        description="folder of `compress teacher cache` with what this teacher says of this text; without it "
        "the teacher is run over every batch",
    )

    @field_validator("loss", mode="before")
    @classmethod
    def _spelled(cls, value: Any) -> Any:
        """Terms from a command line; a term alone has the weight 1."""
        if not isinstance(value, str):
            return value
        pairs = (entry.partition("=") for entry in value.split(","))
        return {name.strip(): weight if equals else 1.0 for name, equals, weight in pairs}

    @field_validator("loss")
    @classmethod
    def _weighted(cls, value: dict[Term, float]) -> dict[Term, float]:
        for name, weight in value.items():
            if not (weight > 0 and isfinite(weight)):
                raise ValueError(f"the weight of {name} must be a number above 0: leave the term out")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "Logits":
        if self.cache is not None and self.temperature != 1.0:
            raise ValueError(
                "a cached teacher cannot be softened, since of the tail it knows the sum alone: "
                "leave out temperature, or cache"
            )
        return self

    @property
    def learns_text(self) -> bool:
        """See `Distiller.learns_text`."""
        return "cross_entropy" in self.loss

    @property
    def stored(self) -> Path | None:
        """See `Distiller.stored`."""
        return None if self.cache is None else Path(self.cache).expanduser()

    def objective(
        self, model: Any, student: "Halves", teacher: "Teacher", chunk: int, arithmetic: "Arithmetic"
    ) -> "Objective":
        """See `Distiller.objective`."""
        from compress.training.imitation import Distributions

        criterion = Criterion(self.loss, self.beta, self.temperature)
        return Distributions(student, teacher, criterion=criterion, chunk=chunk, arithmetic=arithmetic)
