"""Distillation on the student's own text: what it writes is scored by its teacher.

A student that has only seen the text is never shown what follows its own mistakes, which is where it is when
it serves. Here a share of the passes (`share`) goes over sequences that the student samples at that moment:
the beginning of each window is given, and the student writes on (`prompt_tokens`, `max_new_tokens`,
`temperature`). The other passes go over the text, as in `distill.logits`. What is learned in both is the
generalised Jensen-Shannon divergence from the teacher's distributions; on sampled sequences at the sampled
tokens alone.

The price is the sampling, token by token, which takes several times as long as a pass over the same number of
tokens. Worth it for models that write long answers; to win back what pruning took, begin with
`distill.logits`, and give the last part of the tokens to this method. The teacher is run over what was never
written before, so that it cannot be cached.

All else is as there: float32 weights without dropout, zeros of pruning kept, the best weights on the
validation text, a table with one row a step, and going on after a crash to the same bytes: what is drawn in a
step depends on the seed and the step alone. Several processes share a step too, and each draws for itself.
Where documents are kept apart (`documents`), the student goes on with the last one of its prompt.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

from pydantic import Field, model_validator

from compress.core.passes import Paper
from compress.numerics.criterion import Criterion
from compress.training.distiller import Comparison, Distiller

if TYPE_CHECKING:
    from compress.training.head import Halves
    from compress.training.imitation import Teacher
    from compress.training.objective import Objective
    from compress.training.packing import Packing
    from compress.training.precision import Arithmetic


@final
class OnPolicy(Distiller):
    """Learn a teacher's distributions on text that the student writes."""

    summary: ClassVar[str] = "train the model on what it writes itself, as a teacher would have gone on"
    paper: ClassVar[Paper | None] = Paper(
        title="On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        url="https://arxiv.org/abs/2306.13649",
        authors="Agarwal et al.",
        year=2024,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--teacher TEACHER --train TEXT --tokens 5_000_000",
        "--teacher TEACHER --train TEXT --share 1 --beta 0.9 --temperature 0.7 --max-new-tokens 256",
    )

    share: float = Field(
        default=0.5, ge=0, le=1, description="share of the passes whose sequences the student samples"
    )
    beta: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of the teacher in the mixture of the Jensen-Shannon divergence: near 0 it is like "
        "the forward divergence, near 1 like the reverse one, and at both ends it is that divergence",
    )
    temperature: float = Field(default=1.0, gt=0, description="what logits are divided by in sampling")
    prompt_tokens: int = Field(
        default=128, ge=1, description="tokens at the beginning of a window that are given to the student"
    )
    max_new_tokens: int = Field(default=128, ge=1, description="tokens that it writes after them")

    @model_validator(mode="after")
    def _fits(self) -> "OnPolicy":
        length = self.prompt_tokens + self.max_new_tokens
        if length > self.window:
            raise ValueError(
                f"prompt_tokens {self.prompt_tokens} and max_new_tokens {self.max_new_tokens} make {length} "
                f"tokens, and a window has {self.window}: lower one of them, or raise window"
            )
        return self

    @property
    def learns_text(self) -> bool:
        """See `Distiller.learns_text`."""
        return False

    @property
    def comparison(self) -> Comparison:
        """See `Distiller.comparison`."""
        return "same"

    @property
    def stored(self) -> Path | None:
        """See `Distiller.stored`."""
        return None

    def objective(
        self,
        model: Any,
        student: "Halves",
        teacher: "Teacher",
        chunk: int,
        arithmetic: "Arithmetic",
        packing: "Packing",
    ) -> "Objective":
        """See `Distiller.objective`."""
        from compress.training.imitation import Distributions
        from compress.training.on_policy import OnPolicy as Sampled

        criterion = Criterion({"jensen_shannon": 1.0}, self.beta)
        imitation = Distributions(
            student, teacher, criterion=criterion, chunk=chunk, arithmetic=arithmetic, packing=packing
        )
        return Sampled(
            model,
            imitation,
            share=self.share,
            temperature=self.temperature,
            prompt=self.prompt_tokens,
            length=self.max_new_tokens,
            arithmetic=arithmetic,
            packing=packing,
        )
