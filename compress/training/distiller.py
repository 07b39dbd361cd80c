"""What methods have in common that learn next-token distributions from a teacher: who may teach, what a
training takes, and the way from a source to what is written.

A method says which objective it has. Nothing here imports torch before a method is planned or applied.
"""

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from compress.core.errors import PlanError
from compress.core.passes import Needs, Outcome
from compress.training.trainer import Trainer

if TYPE_CHECKING:
    from compress.core.artifact import Artifact
    from compress.core.run import Run
    from compress.data.training import TrainingText
    from compress.training.head import Halves
    from compress.training.imitation import Teacher
    from compress.training.objective import Objective
    from compress.training.packing import Packing
    from compress.training.precision import Arithmetic

Comparison = Literal["same", "aligned", "uld"]
"""How the tokens of student and teacher are compared; what they are is in `compress.numerics.outcomes`."""


class Distiller(Trainer):
    """A pass that trains a model to say what a teacher says."""

    other_models: ClassVar[tuple[str, ...]] = ("teacher",)

    teacher: str = Field(
        default="$model",
        min_length=1,
        description="model to learn from: a folder, a hub id, builtin:NAME, or `$model`, the model that the "
        "recipe starts from",
    )
    chunk: int | Literal["auto"] = Field(
        default="auto",
        description="positions whose logits stand in memory at once; `auto` goes by vocabulary and device",
    )

    @field_validator("chunk")
    @classmethod
    def _positive(cls, value: int | Literal["auto"]) -> int | Literal["auto"]:
        if value != "auto" and value < 1:
            raise ValueError("must be a positive number of positions or 'auto'")
        return value

    @property
    @abstractmethod
    def learns_text(self) -> bool:
        """Whether there is something to learn from a teacher that is the student itself."""

    @property
    @abstractmethod
    def stored(self) -> Path | None:
        """The folder with what the teacher says, where it is not to be asked again."""

    @property
    @abstractmethod
    def comparison(self) -> Comparison:
        """How tokens are compared."""

    @abstractmethod
    def objective(
        self,
        model: Any,
        student: "Halves",
        teacher: "Teacher",
        chunk: int,
        arithmetic: "Arithmetic",
        packing: "Packing",
    ) -> "Objective":
        """What is learned.

        Args:
            model: the student.
            student: the same in two halves.
        """

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse a missing text, another task and a teacher of another vocabulary; predict the work."""
        from compress.data import training
        from compress.models.load import skeleton
        from compress.training.precision import resolved
        from compress.training.prediction import Shape, predict
        from compress.training.trainee import check

        teacher = self._found(source, run)
        student_shape = Shape.of(skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code))
        teacher_shape = Shape.of(skeleton(teacher, task="auto", trust_remote_code=run.trust_remote_code))
        check(self, source, run)
        self._compared(source, teacher, (student_shape.vocabulary, teacher_shape.vocabulary), run)
        if run.training is not None:
            training.check(run.training)
        if self.stored is not None:
            self._opened(self.stored, source, teacher, run)
        asked = teacher_shape if self.stored is None else None
        chunk = self._chunk(student_shape.vocabulary, run)
        arithmetic = resolved(self.precision, run.device)
        return predict(self, source, student_shape, asked, arithmetic, run.device, chunk)

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Train, take up what was trained before, and write the weights that are kept."""
        from compress.models.tasks import TextGeneration
        from compress.training.packing import Packing
        from compress.training.precision import resolved
        from compress.training.teacher import tables
        from compress.training.tutoring import Lesson, halves_of, teach
        from compress.training.vocabularies import restricted

        teacher = self._found(source, run)
        arithmetic = resolved(self.precision, run.device)
        sizes = tables(source, teacher, TextGeneration(), run)
        count = self._compared(source, teacher, sizes, run)

        def lesson(model: Any) -> Lesson:
            text, teaching, told = self._lessons(source, teacher, run, count, arithmetic)
            parts = restricted(halves_of(model, text, run, arithmetic), sizes[0], count)
            objective = self.objective(
                model, parts, teaching, self._chunk(sizes[0], run), arithmetic, Packing(text.end)
            )
            return Lesson(text, objective, told={"teacher": teacher.digest, **told})

        return teach(self, source, target, run, lesson)

    def _found(self, source: "Artifact", run: "Run") -> "Artifact":
        from compress.training.teacher import teacher_of

        teacher = teacher_of(self, "teacher", source, run)
        if not self.learns_text and teacher.digest == source.digest:
            raise PlanError(
                f"teacher and student are the same model ({source.path}): there is nothing to learn",
                "give another --teacher, or a loss with cross_entropy to train on the text",
            )
        return teacher

    def _compared(self, source: "Artifact", teacher: "Artifact", sizes: tuple[int, int], run: "Run") -> int:
        """Tokens of the student that are compared, the first of its table.

        Args:
            sizes: rows of the tables of student and teacher.
        """
        from compress.training.teacher import same_vocabulary
        from compress.training.vocabularies import translation

        if self.comparison != "same":
            translation(source, teacher, run)
            return sizes[0]
        count = same_vocabulary(source, teacher, sizes, run)
        if self.stored is not None and count < sizes[0]:
            raise PlanError(
                f"the tables of {source.path} and teacher {teacher.path} have {sizes[0]:,} and {sizes[1]:,} "
                "rows for one tokenizer, and a cached teacher is of the longer one",
                "leave --cache out, and the teacher is run",
            )
        return count

    def _chunk(self, vocabulary: int, run: "Run") -> int:
        from compress.training.prediction import chunk_of

        return chunk_of(vocabulary, run.device) if self.chunk == "auto" else self.chunk

    def _opened(self, folder: Path, source: "Artifact", teacher: "Artifact", run: "Run") -> Any:
        """What the teacher said, once it is clear that it is of this teacher, tokenizer, text and window."""
        from compress.data import training
        from compress.training.teacher_cache import Origin, TeacherCache, vocabulary_digest
        from compress.training.tutoring import words_of

        cache = TeacherCache.open(folder)
        if run.training is not None:
            words = words_of(self, source, run)
            cache.check(
                Origin(
                    teacher=teacher.digest,
                    tokenizer=None if words is None else vocabulary_digest(words),
                    text=training.digest_of_source(run.training),
                    window=self.window,
                )
            )
        return cache

    def _lessons(
        self, source: "Artifact", teacher: "Artifact", run: "Run", vocabulary: int, arithmetic: "Arithmetic"
    ) -> "tuple[TrainingText, Teacher, dict[str, Any]]":
        """What is trained on, who teaches it, and what the lineage remembers of that."""
        from compress.models.tasks import TextGeneration
        from compress.training.across import ForeignTeacher
        from compress.training.imitation import LiveTeacher
        from compress.training.tutoring import drawn, guide_of, halves_of
        from compress.training.vocabularies import restricted, translation

        count = self.steps * self.batch * self.accumulation
        if self.stored is not None:
            cache = self._opened(self.stored, source, teacher, run)
            return cache.text(count, self.evaluation_windows), cache, {"teacher_cache": cache.facts}
        text = drawn(self, source, run, TextGeneration(), vocabulary)
        model = guide_of(teacher, TextGeneration(), run, arithmetic)
        parts = halves_of(model, text, run, arithmetic)
        if self.comparison != "same":
            words = translation(source, teacher, run)
            return text, ForeignTeacher(parts, words), {"pairs": len(words.pairs)}
        rows = int(model.get_input_embeddings().weight.shape[0])
        return text, LiveTeacher(restricted(parts, rows, vocabulary)), {"compared_tokens": vocabulary}
