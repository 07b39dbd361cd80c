"""Distillation of hidden states, attention and embeddings: what a teacher computes on its way.

A teacher says more than its last word. What it computes layer by layer tells a student how to get there,
which helps most where the student is much smaller, where there is little text, and where there is no head
to learn from at all: an encoder of sentences is distilled on plain text, without labels. For a decoder
that lost little, `distill.logits` is cheaper and enough. Several losses are added up with weights; 0
leaves one out:

- `states`: hidden states after each layer, against those of the layer of the teacher that it is mapped
  to, evenly spaced where nothing else is said (DistilBERT, TinyBERT). Where widths differ, a matrix that
  is trained beside the student projects its states to the teacher's width, and is thrown away in the end.
- `relations`: how alike the queries, the keys and the values of each two positions are, cut into as many
  relation heads in both models whatever their own heads are (MiniLMv2). The student's width and heads are
  free.
- `maps`: attention scores, head by head; both models need as many heads (TinyBERT).
- `embeddings`: what goes into the first layer (TinyBERT).
- `outputs`: what comes out: the next-token distributions of a language model, as in `distill.logits`; the
  classes of a classifier, as in `distill.classes`; the vector of a text of an encoder.

States are recorded while the models run. Queries, keys and values are taken where the model hands them to
its attention function, so that no architecture is known by name; a model without such a place, or with
several stacks of layers, is refused when the chain is planned. Teacher and student read the same tokens,
so they need one vocabulary.

A language model reads windows of a stream of text. An encoder and a classifier read documents one by one,
padded to the longest; each counts as a whole window in `tokens`. Losses are means over positions and
layers, and a document counts as much as another, however long.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, final

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from compress.core.errors import PlanError
from compress.core.passes import Needs, Outcome, Paper
from compress.training.trainer import Trainer

if TYPE_CHECKING:
    from compress.core.artifact import Artifact
    from compress.core.run import Run
    from compress.models.tasks import Task
    from compress.training.arrangement import Within
    from compress.training.inner_plan import Wish
    from compress.training.matching import Term
    from compress.training.tutoring import Lesson


_COPIES: Final = 6
"""Tensors of the size of the matrices of attention that a loss and its gradient take."""
_FOREIGN: Final[Mapping[str, tuple[str, ...]]] = {
    "text-generation": ("pooling",),
    "text-classification": ("pooling", "chunk"),
    "feature-extraction": ("temperature", "cross_entropy", "chunk"),
}
"""Options that say nothing about what comes out of a model, by its task."""


@final
class Hidden(Trainer):
    """Learn what a teacher computes on its way."""

    summary: ClassVar[str] = (
        "train the model to compute inside what a teacher does; for encoders, without labels"
    )
    paper: ClassVar[Paper | None] = Paper(
        title="TinyBERT: Distilling BERT for Natural Language Understanding",
        url="https://arxiv.org/abs/1909.10351",
        authors="Jiao et al.",
        year=2020,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--teacher TEACHER --train TEXT --tokens 5_000_000",
        "--teacher TEACHER --train TEXT --states 0 --relations 1 --outputs 0",
        "--teacher TEACHER --train TEXT --maps 1 --embeddings 1 --layer-map 2 --layer-map 4 --layer-map 6",
    )
    other_models: ClassVar[tuple[str, ...]] = ("teacher",)

    teacher: str = Field(
        default="$model",
        min_length=1,
        description="model to learn from: a folder, a hub id, builtin:NAME, or `$model`, the model that the "
        "recipe starts from",
    )
    states: float = Field(default=1.0, ge=0, description="weight of the hidden states after each layer")
    relations: float = Field(
        default=0.0, ge=0, description="weight of the relations among queries, keys and values"
    )
    maps: float = Field(default=0.0, ge=0, description="weight of the attention scores of each head")
    embeddings: float = Field(default=0.0, ge=0, description="weight of what goes into the first layer")
    outputs: float = Field(default=1.0, ge=0, description="weight of what comes out")
    layer_map: tuple[NonNegativeInt, ...] = Field(
        default=(),
        description="the teacher's layer for each layer of the student in order, counted from 1, 0 for one "
        "that learns from none; none at all spaces them evenly",
    )
    distance: Literal["relative", "mse", "cosine"] = Field(
        default="relative",
        description="of hidden states, embeddings and vectors: the squared difference as a share of the "
        "teacher's square, its mean, or one minus the cosine",
    )
    projection: Literal["auto", "always"] = Field(
        default="auto",
        description="what brings states to the teacher's width: a learned matrix where widths differ "
        "(`auto`), or `always`",
    )
    relation_layers: Literal["last", "all"] = Field(
        default="last", description="layers whose relations are compared: the last of the map, or all"
    )
    relation_heads: PositiveInt | None = Field(
        default=None,
        description="relation heads, which must divide the widths of both models' queries, keys and values; "
        "none takes as many as the teacher has heads, or the next number that does",
    )
    pooling: Literal["mean", "first"] = Field(
        default="mean",
        description="an encoder's vector of a text: the mean over its tokens, or that of the first one",
    )
    temperature: float = Field(
        default=1.0, gt=0, description="what both models' logits are divided by; above 1 small chances count"
    )
    cross_entropy: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of the cross-entropy in the loss of what comes out: on the text, or on labels",
    )
    chunk: PositiveInt | Literal["auto"] = Field(
        default="auto",
        description="positions whose logits stand in memory at once; `auto` goes by vocabulary and device",
    )

    @model_validator(mode="after")
    def _something(self) -> "Hidden":
        if not any((self.states, self.relations, self.maps, self.embeddings, self.outputs)):
            raise ValueError("every weight is 0: there is nothing to learn")
        return self

    @property
    def _wish(self) -> "Wish":
        from compress.training.inner_plan import Wish

        weights: dict[Term, float] = {
            "states": self.states,
            "relations": self.relations,
            "maps": self.maps,
            "embeddings": self.embeddings,
        }
        return Wish(weights, self.layer_map, self.relation_layers, self.relation_heads, self.distance)

    def _teacher(self, source: "Artifact", run: "Run") -> "tuple[Artifact, Task]":
        from compress.models.tasks import FeatureExtraction, TextClassification, TextGeneration, resolve
        from compress.training.teacher import same_classes, teacher_of
        from compress.training.tutoring import check_documents

        kinds = (TextGeneration, TextClassification, FeatureExtraction)
        teacher = teacher_of(self, "teacher", source, run, kinds)
        task = resolve(run.task, source.config)
        for option in _FOREIGN[task.name]:
            if getattr(self, option) != type(self).model_fields[option].default:
                raise PlanError(
                    f"{option} means nothing to {source.path}: it is another kind of model ({task.title})",
                    f"leave --{option.replace('_', '-')} out",
                )
        check_documents(self, source, task)
        if isinstance(task, TextClassification):
            same_classes(source, teacher, run)
        if teacher.digest == source.digest and not self.cross_entropy and not self.layer_map:
            raise PlanError(
                f"teacher and student are the same model ({source.path}): there is nothing to learn",
                "give another --teacher, or a --layer-map by which layers learn from other ones",
            )
        return teacher, task

    def _within(self, source: "Artifact", teacher: "Artifact", task: "Task", run: "Run") -> "Within | None":
        from compress.models.tasks import FeatureExtraction, TextGeneration
        from compress.training.arrangement import Within, interior_of
        from compress.training.inner_plan import comparison

        wish = self._wish
        # The vectors of an encoder are as wide as its hidden states, and may have to be projected too.
        if not wish.wanted and not isinstance(task, FeatureExtraction):
            return None
        student, other = (interior_of(each, task, run) for each in (source, teacher))
        plan = comparison(wish, student, other, causal=isinstance(task, TextGeneration))
        return Within(plan, (student.width, other.width), self.projection == "always")

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse what cannot be recorded, mapped or compared, and another kind of teacher; predict."""
        from compress.data import training
        from compress.models.load import skeleton
        from compress.models.tasks import TextGeneration
        from compress.training.precision import resolved
        from compress.training.prediction import Shape, chunk_of, predict
        from compress.training.teacher import same_vocabulary
        from compress.training.trainee import check
        from compress.training.tutoring import padding_of

        teacher, task = self._teacher(source, run)
        check(self, source, run)
        ours, theirs = (
            Shape.of(skeleton(each, task=task.name, trust_remote_code=run.trust_remote_code))
            for each in (source, teacher)
        )
        same_vocabulary(source, teacher, (ours.vocabulary, theirs.vocabulary), run)
        within = self._within(source, teacher, task, run)
        chunk = 1
        if isinstance(task, TextGeneration):
            chunk = chunk_of(ours.vocabulary, run.device) if self.chunk == "auto" else self.chunk
        else:
            padding_of(source, run)
        if run.training is not None:
            training.check(run.training)
        arithmetic = resolved(self.precision, run.device)
        # Matrices of both models in float32, with what their gradients take.
        matrices = _COPIES * 4 * self.window**2 * (within.plan.matrices if within else 0)
        return predict(self, source, ours, theirs, arithmetic, run.device, chunk, matrices)

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Train, take up what was trained before, and write the weights that are kept."""
        from compress.models.tasks import TextGeneration
        from compress.training.arrangement import Asked, arranged
        from compress.training.precision import resolved
        from compress.training.teacher import same_vocabulary, tables
        from compress.training.tutoring import drawn, guide_of, padding_of, teach

        teacher, task = self._teacher(source, run)
        within = self._within(source, teacher, task, run)
        count = same_vocabulary(source, teacher, tables(source, teacher, task, run), run)
        asked = Asked(
            self.outputs,
            self.temperature,
            self.cross_entropy,
            self.pooling,
            self.distance,
            None if self.chunk == "auto" else self.chunk,
            0 if isinstance(task, TextGeneration) else padding_of(source, run),
            count,
        )

        def lesson(model: Any) -> "Lesson":
            text = drawn(self, source, run, task, count)
            arithmetic = resolved(self.precision, run.device)
            guide = guide_of(teacher, task, run, arithmetic)
            return arranged(model, guide, task, asked, within, text=text, arithmetic=arithmetic, run=run)

        outcome = teach(self, source, target, run, lesson)
        decisions = {**outcome.decisions, "teacher": teacher.digest}
        if within is not None:
            decisions["layer_pairs"] = [list(pair) for pair in within.plan.pairs]
            if self.relations:
                decisions["relation_heads"] = within.plan.relation_heads
        return Outcome(decisions, outcome.tensors)
