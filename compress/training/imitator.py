"""What methods have in common that learn a teacher's distributions by a weighted sum of divergences."""

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from compress.numerics.criterion import Criterion, Term
from compress.training.distiller import Comparison, Distiller

if TYPE_CHECKING:
    from compress.training.head import Halves
    from compress.training.imitation import Teacher
    from compress.training.objective import Objective
    from compress.training.packing import Packing
    from compress.training.precision import Arithmetic


class Imitator(Distiller):
    """A pass that trains a model to say what a teacher says, by a loss that is composed of terms."""

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

    vocabulary: Comparison = Field(
        default="same",
        description="how tokens are compared: `same` wants one tokenizer; of different ones `aligned` "
        "compares tokens that stand for the same characters and all others together, `uld` probabilities in "
        "the order of their size",
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
    def _consistent(self) -> "Imitator":
        if self.cache is not None and self.temperature != 1.0:
            raise ValueError(
                "a cached teacher cannot be softened, since of the tail it knows the sum alone: "
                "leave out temperature, or cache"
            )
        if self.cache is not None and self.vocabulary != "same":
            raise ValueError(
                f"a cached teacher says its own tokens, which vocabulary {self.vocabulary} cannot compare: "
                "leave out cache"
            )
        if self.documents == "apart" and (self.cache is not None or self.vocabulary != "same"):
            kind = "a cached teacher" if self.cache is not None else "a teacher with another tokenizer"
            raise ValueError(f"{kind} reads the documents of a window joined: leave documents out")
        if self.vocabulary == "uld" and set(self.loss) != {"total_variation", "cross_entropy"}:
            raise ValueError(
                "sorted probabilities do not say which token is meant: vocabulary uld wants a loss of "
                "total_variation and cross_entropy, as in total_variation=3,cross_entropy=1"
            )
        return self

    @property
    def learns_text(self) -> bool:
        """See `Distiller.learns_text`."""
        return "cross_entropy" in self.loss

    @property
    def comparison(self) -> Comparison:
        """See `Distiller.comparison`."""
        return self.vocabulary

    @property
    def stored(self) -> Path | None:
        """See `Distiller.stored`."""
        return None if self.cache is None else Path(self.cache).expanduser()

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
        from compress.training.across import Across, ForeignTeacher
        from compress.training.imitation import Distributions

        criterion = Criterion(self.loss, self.beta, self.temperature)
        if isinstance(teacher, ForeignTeacher):
            return Across(
                student,
                teacher,
                comparison=self.vocabulary,
                criterion=criterion,
                chunk=chunk,
                arithmetic=arithmetic,
            )
        return Distributions(
            student, teacher, criterion=criterion, chunk=chunk, arithmetic=arithmetic, packing=packing
        )
