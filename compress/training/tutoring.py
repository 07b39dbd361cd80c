"""From an artifact to the one that was trained: text is drawn, a student is trained, written and told of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
from compress.runtimes import Placement
from compress.runtimes.torch_eager import load_model
from compress.training.head import Halves, halves
from compress.training.loop import Loop, Trained
from compress.training.objective import Objective
from compress.training.packing import Packing
from compress.training.precision import Arithmetic, autocast, deterministic, resolved
from compress.training.trainee import means_of, trainee_of
from compress.training.trainer import Trainer


@dataclass(frozen=True)
class Lesson:
    """What is learned.

    Attributes:
        text: what it is learned from.
        objective: the loss.
        beside: what is trained together with the student and thrown away, if anything.
        told: what the lineage should remember of it.
    """

    text: TrainingText
    objective: Objective
    beside: torch.nn.Module | None = None
    told: Mapping[str, Any] = field(default_factory=dict)


def words_of(method: Trainer, source: Artifact, run: Run) -> Any:
    """The student's tokenizer, where the texts are text and not tokens, or documents are kept apart."""
    if run.training is None or not (method.documents == "apart" or training.needs_tokenizer(run.training)):
        return None
    return tokenizer(source, trust_remote_code=run.trust_remote_code)


def drawn(method: Trainer, source: Artifact, run: Run, task: Task, vocabulary: int) -> TrainingText:
    """Windows of a stream of text for a model that writes text, documents for all others.

    Args:
        source: the student.
        vocabulary: tokens that student and teacher know.

    Raises:
        PlanError: there is no training text.
        DataError, UsageError, EnvironmentFault: as the texts have it.
    """
    if run.training is None:
        raise PlanError("the method needs training text", "give --train TEXT or data.train")
    words = words_of(method, source, run)
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
            apart=method.documents == "apart",
        )
    classes = None
    if isinstance(task, TextClassification):
        classes = len(configuration(source.path, trust_remote_code=run.trust_remote_code).id2label)
    reading = documents.Reading(words, vocabulary, method.window, classes, source.config)
    return documents.draw(run.training, reading, run.seed, rows=rows, held_out=held_out)


def halves_of(model: Any, text: TrainingText, run: Run, arithmetic: Arithmetic) -> Halves:
    """A language model in two halves, which reads the windows of a text as their documents are packed.

    Raises:
        ModelError: it cannot keep documents apart.
    """
    device, packing = torch.device(run.device), Packing(text.end)
    # Another vocabulary may end earlier, and any token will do.
    probe = text.held_out[:1, :8].clamp(max=model.get_input_embeddings().weight.shape[0] - 1).to(device)
    packing.check(model, probe)
    with autocast(arithmetic, device):
        return halves(model, probe, packing.batch)


def guide_of(teacher: Artifact, task: Task, run: Run, arithmetic: Arithmetic) -> Any:
    """A teacher in memory, as the bench would bring it there."""
    placement = Placement(run.device, arithmetic, run.trust_remote_code)
    model, _ = load_model(teacher, task, placement)
    return model.requires_grad_(False)


def check_documents(method: Trainer, source: Artifact, task: Task) -> None:
    """Refuse what only windows of a stream of text can be told.

    Raises:
        PlanError: the model reads documents one by one.
    """
    if method.documents != "joined" and not isinstance(task, TextGeneration):
        raise PlanError(
            f"documents means nothing to {source.path}, a {task.title}, which reads them one by one",
            "leave --documents out",
        )


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
    method: Trainer, source: Artifact, target: Path, run: Run, lesson: Callable[[Any], Lesson]
) -> Outcome:
    """Train a student, take up what was trained before, and write the weights that are kept.

    Args:
        method: with the numbers of the training.
        source: the student.
        target: the working folder.
        lesson: what is learned, from the student in memory.
    """
    arithmetic = resolved(method.precision, run.device)
    with deterministic(torch.device(run.device)):
        student = trainee_of(method, source, run)
        learned = lesson(student.model)
        text, objective = learned.text, learned.objective
        run.reporter.message(text.description)
        run.scratch.mkdir(parents=True, exist_ok=True)
        trained = Loop(student.model, objective, text, method, run, learned.beside).train()
    if trained.kept == 0:
        run.reporter.message(
            "warning: no step made the validation loss smaller; the weights are those of the source "
            "(other --learning-rate or --train?)"
        )
        student.reload()
    settled = student.settle(target, lambda: means_of(objective, text.held_out, method.batch, run.device))
    heard: Any = lambda file, name: run.reporter.event("shard.tensor", file=file, tensor=name)  # noqa: E731
    meant = student.write(target, heard)
    (target / TRAINING_FILE).write_text(trained.history.csv(), encoding="utf-8")
    changed = sum(entry.changed for entry in meant.values())
    decisions = {"changed": changed, "precision": arithmetic, **_told(trained, text, method)}
    return Outcome({**decisions, **learned.told, **settled}, meant)


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
