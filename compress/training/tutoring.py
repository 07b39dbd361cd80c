"""From an artifact to the one that was trained: text is drawn, a student is trained, written and told of."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.core.artifact import TRAINING_FILE, Artifact
from compress.core.errors import PlanError
from compress.core.passes import Outcome
from compress.core.run import Run
from compress.data import documents, training
from compress.data.training import TrainingText
from compress.models.load import configuration, tokenizer
from compress.models.tasks import Task, TextClassification, TextGeneration
from compress.training.loop import Loop, Trained
from compress.training.objective import Objective
from compress.training.precision import deterministic, resolved
from compress.training.student import Student
from compress.training.trainer import Trainer


@dataclass(frozen=True)
class Lesson:
    """What is learned.

    Attributes:
        objective: the loss.
        beside: what is trained together with the student and thrown away, if anything.
    """

    objective: Objective
    beside: torch.nn.Module | None = None


def drawn(method: Trainer, source: Artifact, run: Run, task: Task, vocabulary: int) -> TrainingText:
    """Windows of a stream of text for a model that writes text, documents for all others.

    Args:
        source: the student.
        vocabulary: rows of its embedding.

    Raises:
        PlanError: there is no training text.
        DataError, UsageError, EnvironmentFault: as the texts have it.
    """
    if run.training is None:
        raise PlanError("the method needs training text", "give --train TEXT or data.train")
    words = None
    if training.needs_tokenizer(run.training):
        words = tokenizer(source, trust_remote_code=run.trust_remote_code)
    rows = method.steps * method.batch * method.accumulation
    held_out = method.evaluation_windows
    if isinstance(task, TextGeneration):
        return training.draw(
            run.training,
            words,
            run.seed,
            vocabulary,
            windows=rows,
            held_out=held_out,
            length=method.window,
        )
    classes = None
    if isinstance(task, TextClassification):
        classes = len(configuration(source.path, trust_remote_code=run.trust_remote_code).id2label)
    reading = documents.Reading(words, vocabulary, method.window, classes, source.config)
    return documents.draw(run.training, reading, run.seed, rows=rows, held_out=held_out)


def padding_of(source: Artifact, run: Run) -> int:
    """The token that pads documents.

    Raises:
        PlanError: the configuration names none.
    """
    padding = configuration(source.path, trust_remote_code=run.trust_remote_code).pad_token_id
    if padding is None:
        raise PlanError(
            f"{source.path} names no token for padding, and documents of several lengths are padded",
            "set pad_token_id in its config.json",
        )
    return int(padding)


def teach(
    method: Trainer,
    source: Artifact,
    target: Path,
    run: Run,
    task: Task,
    lesson: Callable[[Any, TrainingText], Lesson],
) -> Outcome:
    """Train a student, take up what was trained before, and write the weights that are kept.

    Args:
        method: with the numbers of the training.
        source: the student.
        target: the working folder.
        task: of the student.
        lesson: what is learned, from the student in memory and the text that was drawn.
    """
    arithmetic = resolved(method.precision, run.device)
    with deterministic(torch.device(run.device)):
        student = Student(source, run)
        vocabulary = int(student.model.get_input_embeddings().weight.shape[0])
        text = drawn(method, source, run, task, vocabulary)
        run.reporter.message(text.description)
        run.scratch.mkdir(parents=True, exist_ok=True)
        learned = lesson(student.model, text)
        trained = Loop(student.model, learned.objective, text, method, run, learned.beside).train()
    if trained.kept == 0:
        run.reporter.message(
            "warning: no step made the validation loss smaller; the weights are those of the source "
            "(other --learning-rate or --train?)"
        )
        student.reload()
    told: Callable[[str, str], None] = lambda file, name: run.reporter.event(  # noqa: E731 - names its arguments
        "shard.tensor", file=file, tensor=name
    )
    meant = student.write(target, told)
    (target / TRAINING_FILE).write_text(trained.history.csv(), encoding="utf-8")
    changed = sum(entry.changed for entry in meant.values())
    return Outcome({"changed": changed, "precision": arithmetic, **_told(trained, text, method)}, meant)


def _told(trained: Trained, text: TrainingText, method: Trainer) -> dict[str, Any]:
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
