"""Student and teacher in memory together, recorded where that is needed, with the loss between them."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from compress.core.artifact import Artifact
from compress.core.run import Run
from compress.data.training import TrainingText
from compress.models.interior import Interior, Recorder, survey
from compress.models.load import skeleton
from compress.models.tasks import FeatureExtraction, Task, TextClassification, TextGeneration
from compress.numerics.criterion import Criterion, Term
from compress.numerics.inner_states import Distance
from compress.training.imitation import Distributions, LiveTeacher
from compress.training.matching import VECTOR, Inside, Matching, Plan, Projections
from compress.training.outputs import (
    Classes,
    NextTokens,
    Outputs,
    Pooling,
    Side,
    Vectors,
    Watch,
    Watched,
)
from compress.training.packing import Packing
from compress.training.precision import Arithmetic
from compress.training.prediction import chunk_of
from compress.training.tutoring import Lesson, halves_of
from compress.training.vocabularies import restricted


@dataclass(frozen=True)
class Asked:
    """How what comes out is compared.

    Attributes:
        weight: of its loss.
        temperature, share: of a language model and a classifier, as in `Distributions` and `Classes`.
        pooling, distance: of an encoder, as in `Vectors`.
        chunk: of a language model: positions whose logits stand in memory at once, ``None`` for a
            number that goes by vocabulary and device.
        padding: token of padding, of all others.
        vocabulary: of a language model: tokens that are compared, the first of both tables; ``None`` for all.
    """

    weight: float = 1.0
    temperature: float = 1.0
    share: float = 0.0
    pooling: Pooling = "mean"
    distance: Distance = "relative"
    chunk: int | None = None
    padding: int = 0
    vocabulary: int | None = None


@dataclass(frozen=True)
class Within:
    """What is compared inside, and what is projected.

    Attributes:
        plan: layers and weights; without a weight nothing is compared.
        widths: of the hidden states of student and teacher.
        always: whether states are projected where the widths are the same, too.
    """

    plan: Plan
    widths: tuple[int, int]
    always: bool

    def projections(self, seed: int, *, vector: bool) -> Projections:
        """The projections to train.

        Args:
            vector: whether vectors of texts are compared as well.
        """
        if not self.always and self.widths[0] == self.widths[1]:
            return Projections((), self.widths, seed)
        return Projections((*self.plan.projected, *((VECTOR,) if vector else ())), self.widths, seed)


def interior_of(model: Artifact, task: Task, run: Run) -> Interior:
    """What a model has inside, from its configuration.

    Raises:
        ModelError: it has no stack of blocks or several, or does not run them in order.
    """
    return survey(skeleton(model, task=task.name, trust_remote_code=run.trust_remote_code))


def arranged(
    student: Any,
    teacher: Any,
    task: Task,
    asked: Asked,
    within: Within | None,
    *,
    text: TrainingText,
    arithmetic: Arithmetic,
    run: Run,
) -> Lesson:
    """The loss of a student and a teacher that are in memory.

    Args:
        student, teacher: on their device; nothing of the teacher is trained.
        task: of both models.
        within: what is compared inside, if anything.
        text: what is learned from.
    """
    inside = None
    watches: tuple[Watch, Watch] = (nullcontext, nullcontext)
    projections = Projections((), (1, 1), run.seed)
    if within is not None:
        vector = bool(asked.weight) and isinstance(task, FeatureExtraction)
        projections = within.projections(run.seed, vector=vector).to(run.device)
        plan = within.plan
        ours = Recorder(student, attention=plan.attention, layers=plan.layers(0))
        theirs = Recorder(teacher, attention=plan.attention, layers=plan.layers(1))
        watches = ours.recording, theirs.recording
        inside = Inside(ours, theirs, plan, projections)
    outputs: Outputs
    if isinstance(task, TextGeneration):
        outputs = _next_tokens(student, teacher, watches, asked, text, arithmetic, run)
    elif isinstance(task, TextClassification):
        outputs = Classes(
            Side(student, watches[0]),
            Side(teacher, watches[1]),
            asked.padding,
            arithmetic,
            temperature=asked.temperature,
            share=asked.share,
        )
    else:
        outputs = Vectors(
            Side(student, watches[0]),
            Side(teacher, watches[1]),
            asked.padding,
            arithmetic,
            projection=lambda states: projections.at(VECTOR, states),
            pooling=asked.pooling,
            distance=asked.distance,
        )
    return Lesson(text, Matching(outputs, asked.weight, inside), projections)


def _next_tokens(
    student: Any,
    teacher: Any,
    watches: tuple[Watch, Watch],
    asked: Asked,
    text: TrainingText,
    arithmetic: Arithmetic,
    run: Run,
) -> NextTokens:
    rows = [int(model.get_input_embeddings().weight.shape[0]) for model in (student, teacher)]
    ours, theirs = (
        Watched(restricted(halves_of(model, text, run, arithmetic), size, asked.vocabulary or size), watch)
        for model, size, watch in zip((student, teacher), rows, watches, strict=True)
    )
    shares: dict[Term, float] = {"forward_kl": 1.0 - asked.share, "cross_entropy": asked.share}
    objective = Distributions(
        ours,
        LiveTeacher(theirs),
        criterion=Criterion(
            {name: share for name, share in shares.items() if share}, temperature=asked.temperature
        ),
        chunk=asked.chunk or chunk_of(rows[0], run.device),
        arithmetic=arithmetic,
        packing=Packing(text.end),
    )
    return NextTokens(ours, theirs, objective, arithmetic, Packing(text.end))
