"""Distillation of next-token distributions: a student learns to say what its teacher says of every position.

The way to win back what pruning took, and, with a text that is like what will be served, to fit a smaller
model to it. The loss is the forward divergence KL(teacher || student) of distributions softened by a
temperature, times its square, and a share of plain cross-entropy on the text (section 2 of the paper). A
distribution says of each position more than the one token that came next, so that a few million tokens go
a long way; cross-entropy alone needs many more, and pulls a student away from its teacher towards the text.

Any artifact can teach, a quantized one too: it is run as the bench would run it. It must have the student's
vocabulary, since probabilities are compared token by token. Its logits are computed as it is asked, and
never stored: for a vocabulary of 150,000 a million tokens of them would be 600 GB.

What is trained is all float weights, in float32, without dropout; they are saved in the precision that they
had. Zeros that pruning left in a matrix stay zero (`zeros`). Windows of the text hold documents one after
the other with an end of text between, joined or apart (`documents`), and no padding. The best weights on
the validation text are kept, and a run that was killed goes on from its last checkpoint to the same bytes, on
the same kind of device with the same number of threads. `compress.training.csv` in the result has one row a
step. Several processes share the windows of a step: `torchrun --nproc-per-node 2 -m compress distill ...`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

from pydantic import Field, field_validator

from compress.core.errors import PlanError
from compress.core.passes import Needs, Outcome, Paper
from compress.training.trainer import Trainer

if TYPE_CHECKING:
    from compress.core.artifact import Artifact
    from compress.core.run import Run
    from compress.data.training import TrainingText
    from compress.training.loop import Trained


@final
class Logits(Trainer):
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
        "--teacher TEACHER --train TEXT --temperature 2 --cross-entropy 0.1 --learning-rate 5e-4",
    )
    other_models: ClassVar[tuple[str, ...]] = ("teacher",)

    teacher: str = Field(
        default="$model",
        min_length=1,
        description="model to learn from: a folder, a hub id, builtin:NAME, or `$model`, the model that the "
        "recipe starts from",
    )
    temperature: float = Field(
        default=1.0, gt=0, description="what both models' logits are divided by; above 1 small chances count"
    )
    cross_entropy: float = Field(
        default=0.0, ge=0, le=1, description="share of the cross-entropy on the text in the loss"
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

    def _teacher(self, source: "Artifact", run: "Run") -> "Artifact":
        from compress.training.teacher import teacher_of

        teacher = teacher_of(self, "teacher", source, run)
        if self.cross_entropy == 0 and teacher.digest == source.digest:
            raise PlanError(
                f"teacher and student are the same model ({source.path}): there is nothing to learn",
                "give another --teacher, or a --cross-entropy above 0 to train on the text",
            )
        return teacher

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse a missing text, another task and a teacher of another vocabulary; predict the work."""
        from compress.data import training
        from compress.models.load import skeleton
        from compress.training.precision import resolved
        from compress.training.prediction import Shape, chunk_of, predict
        from compress.training.teacher import same_vocabulary

        teacher = self._teacher(source, run)
        student_shape = Shape.of(skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code))
        teacher_shape = Shape.of(skeleton(teacher, task="auto", trust_remote_code=run.trust_remote_code))
        same_vocabulary(source, teacher, (student_shape.vocabulary, teacher_shape.vocabulary), run)
        if run.training is not None:
            training.check(run.training)
        chunk = chunk_of(student_shape.vocabulary, run.device) if self.chunk == "auto" else self.chunk
        arithmetic = resolved(self.precision, run.device)
        return predict(self, source, student_shape, teacher_shape, arithmetic, run.device, chunk)

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Train, take up what was trained before, and write the weights that are kept."""
        import torch

        from compress.core.artifact import TRAINING_FILE
        from compress.training.loop import Loop
        from compress.training.precision import deterministic, resolved
        from compress.training.student import Student

        teacher = self._teacher(source, run)
        arithmetic = resolved(self.precision, run.device)
        device = torch.device(run.device)
        with deterministic(device):
            student = Student(source, run)
            text = _drawn(self, source, run, int(student.model.get_input_embeddings().weight.shape[0]))
            run.reporter.message(text.description)
            run.scratch.mkdir(parents=True, exist_ok=True)
            objective = _objective(self, student.model, teacher, run, text, arithmetic)
            trained = Loop(student.model, objective, text, self, run).train()
        if trained.kept == 0:
            run.reporter.message(
                "warning: no step made the validation loss smaller; the weights are those of the source "
                "(other --learning-rate or --train?)"
            )
            student.reload()
        told: Any = lambda file, name: run.reporter.event("shard.tensor", file=file, tensor=name)  # noqa: E731
        meant = student.write(target, told)
        (target / TRAINING_FILE).write_text(trained.history.csv(), encoding="utf-8")
        changed = sum(entry.changed for entry in meant.values())
        decisions = {"changed": changed, "precision": arithmetic, **_told(trained, text, self)}
        return Outcome({**decisions, "teacher": teacher.digest}, meant)


def _drawn(method: Logits, source: "Artifact", run: "Run", vocabulary: int) -> "TrainingText":
    from compress.data import training
    from compress.models.load import tokenizer

    if run.training is None:
        raise PlanError("the method needs training text", "give --train TEXT or data.train")
    words = None
    apart = method.documents == "apart"
    if apart or training.needs_tokenizer(run.training):
        words = tokenizer(source, trust_remote_code=run.trust_remote_code)
    return training.draw(
        run.training,
        words,
        run.seed,
        vocabulary,
        windows=method.steps * method.batch * method.accumulation,
        held_out=method.evaluation_windows,
        length=method.window,
        apart=apart,
    )


def _objective(
    method: Logits, student: Any, teacher: "Artifact", run: "Run", text: "TrainingText", arithmetic: Any
) -> Any:
    """The loss; the teacher is brought into memory as the bench would bring it."""
    import torch

    from compress.models.tasks import TextGeneration
    from compress.runtimes import Placement
    from compress.runtimes.torch_eager import load_model
    from compress.training.head import halves
    from compress.training.imitation import Distributions
    from compress.training.packing import Packing
    from compress.training.precision import autocast
    from compress.training.prediction import chunk_of

    placement = Placement(run.device, arithmetic, run.trust_remote_code)
    model, _ = load_model(teacher, TextGeneration(), placement)
    device = torch.device(run.device)
    probe = text.held_out[:1, :8].to(device)
    packing = Packing(text.end)
    for each in (student, model):
        packing.check(each, probe)
    with autocast(arithmetic, device):
        parts = [halves(each, probe, packing.batch) for each in (student, model.requires_grad_(False))]
    chunk = method.chunk
    if chunk == "auto":
        chunk = chunk_of(student.get_input_embeddings().weight.shape[0], run.device)
    return Distributions(
        *parts,
        temperature=method.temperature,
        share=method.cross_entropy,
        chunk=chunk,
        arithmetic=arithmetic,
        packing=packing,
    )


def _told(trained: "Trained", text: "TrainingText", method: Logits) -> dict[str, Any]:
    """What the lineage remembers of a training; the rest is in its table."""
    history = trained.history
    return {
        "steps": trained.steps,
        "tokens": trained.steps * method.step_tokens,
        "windows": len(text.windows),
        "zeros_kept": trained.zeros,
        "kept_step": trained.kept,
        "validation": {
            "windows": len(text.held_out),
            "before": history.evaluation(0),
            "last": history.evaluation(trained.steps),
            "best": {"step": trained.best, **history.evaluation(trained.best)},
        },
    }
