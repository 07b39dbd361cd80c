"""Distillation of a classifier: a student learns how likely its teacher finds each class.

For text classification: a fine-tuned encoder and a smaller one with the same classes. The loss is the
divergence KL(teacher || student) of class probabilities softened by a temperature, times its square, and
a share of plain cross-entropy on labels (section 2 of the paper). How sure a teacher is, and which class
it finds second best, says more than a label, and it can be asked about any text: documents without a
label are learned from as well, and where a share of cross-entropy is asked for, the class that the
teacher chooses stands for theirs.

Training text is JSON lines or a table (`.tsv`, `.csv`) with the text and, where there is one, a field
`label`: a number, or a name that the model's configuration knows. Documents are read one by one, padded
to the longest, cut after `window` tokens as they are when a suite is scored; each counts as a whole
window in `tokens`. Documents with labels are held out where there are any, and `validation_accuracy` in
`compress.training.csv` is the share that the student gets right, or, without labels, that it says as its
teacher does.

`distill.hidden` adds what the teacher computes on its way, which helps most where much of the student was
taken out.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

from pydantic import Field

from compress.core.errors import PlanError
from compress.core.passes import Needs, Outcome, Paper
from compress.training.trainer import Trainer

if TYPE_CHECKING:
    from compress.core.artifact import Artifact
    from compress.core.run import Run
    from compress.training.tutoring import Lesson


@final
class Classes(Trainer):
    """Learn a teacher's class probabilities."""

    summary: ClassVar[str] = "train a classifier to say what a teacher says, on text with labels or without"
    paper: ClassVar[Paper | None] = Paper(
        title="Distilling the Knowledge in a Neural Network",
        url="https://arxiv.org/abs/1503.02531",
        authors="Hinton, Vinyals, Dean",
        year=2015,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--teacher TEACHER --train LABELLED.jsonl --window 128 --learning-rate 5e-5",
        "--teacher TEACHER --train TEXTS.tsv --temperature 2 --cross-entropy 0.5",
    )
    other_models: ClassVar[tuple[str, ...]] = ("teacher",)

    teacher: str = Field(
        default="$model",
        min_length=1,
        description="model to learn from: a folder, a hub id, or `$model`, the model that the recipe "
        "starts from",
    )
    temperature: float = Field(
        default=1.0, gt=0, description="what both models' logits are divided by; above 1 small chances count"
    )
    cross_entropy: float = Field(
        default=0.0, ge=0, le=1, description="share of the cross-entropy on labels in the loss"
    )

    def _teacher(self, source: "Artifact", run: "Run") -> "Artifact":
        from compress.models.tasks import TextClassification
        from compress.training.teacher import same_classes, teacher_of
        from compress.training.tutoring import check_documents

        teacher = teacher_of(self, "teacher", source, run, (TextClassification,))
        same_classes(source, teacher, run)
        check_documents(self, source, TextClassification())
        if self.cross_entropy == 0 and teacher.digest == source.digest:
            raise PlanError(
                f"teacher and student are the same model ({source.path}): there is nothing to learn",
                "give another --teacher, or a --cross-entropy above 0 to train on labels",
            )
        return teacher

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse a missing text, another task, and a teacher of other classes or words; predict the work."""
        from compress.data import training
        from compress.models.load import skeleton
        from compress.training.precision import resolved
        from compress.training.prediction import Shape, predict
        from compress.training.teacher import same_vocabulary
        from compress.training.trainee import check
        from compress.training.tutoring import padding_of

        teacher = self._teacher(source, run)
        check(self, source, run)
        ours, theirs = (
            Shape.of(skeleton(each, task="text-classification", trust_remote_code=run.trust_remote_code))
            for each in (source, teacher)
        )
        same_vocabulary(source, teacher, (ours.vocabulary, theirs.vocabulary), run)
        padding_of(source, run)
        if run.training is not None:
            training.check(run.training)
        return predict(self, source, ours, theirs, resolved(self.precision, run.device), run.device, 1)

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Train, take up what was trained before, and write the weights that are kept."""
        from compress.models.tasks import TextClassification
        from compress.training.arrangement import Asked, arranged
        from compress.training.precision import resolved
        from compress.training.teacher import same_vocabulary, tables
        from compress.training.tutoring import drawn, guide_of, padding_of, teach

        teacher, task = self._teacher(source, run), TextClassification()
        padding = padding_of(source, run)
        count = same_vocabulary(source, teacher, tables(source, teacher, task, run), run)
        asked = Asked(temperature=self.temperature, share=self.cross_entropy, padding=padding)

        def lesson(model: Any) -> "Lesson":
            text = drawn(self, source, run, task, count)
            arithmetic = resolved(self.precision, run.device)
            guide = guide_of(teacher, task, run, arithmetic)
            return arranged(model, guide, task, asked, None, text=text, arithmetic=arithmetic, run=run)

        outcome = teach(self, source, target, run, lesson)
        return Outcome({**outcome.decisions, "teacher": teacher.digest}, outcome.tensors)
