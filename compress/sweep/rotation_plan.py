"""What rotating a model changes, settled from the model's structure before any weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.run import Run
from compress.models.architecture import found_in
from compress.models.channels import Anatomy, Channels, dissect
from compress.models.checkpoint import Checkpoint
from compress.models.fold_search import find_folds
from compress.models.folds import Fold
from compress.models.probe import is_linear
from compress.models.stream import Stream, find_stream


@dataclass(frozen=True, eq=False)
class Heads:
    """Values of attention heads that may be rotated head by head.

    Attributes:
        producer: the layer that makes the values, by its path in the model.
        reader: the layer that reads what attention makes of them.
        rows: int64 ``[value heads, size]``, output features of the producer.
        columns: int64 ``[heads, size]``, input columns of the reader.
    """

    producer: str
    reader: str
    rows: torch.Tensor
    columns: torch.Tensor


@dataclass(frozen=True)
class RotationPlan:
    """What will be rotated.

    Attributes:
        stream: who reads and writes the residual stream.
        heads: layers whose heads are rotated too.
        kept: layers whose heads are left, by the layer that reads them, with the reason.
        untied: the head's path, where it shares the embedding's weight and gets one of its own.
    """

    stream: Stream
    heads: tuple[Heads, ...]
    kept: Mapping[str, str]
    untied: str | None


def plan_rotation(
    heads: bool, source: Artifact, model: Any, checkpoint: Checkpoint, run: Run
) -> RotationPlan:
    """Settle what is rotated.

    Args:
        heads: whether values are rotated head by head as well.
        model: a skeleton of the source's model.
        checkpoint: the source's weights beside it.

    Raises:
        PlanError: the residual stream cannot be rotated, or a tensor on disk cannot be changed.
    """
    stream = found_in(find_stream, source, run)
    found: list[Heads] = []
    kept: dict[str, str] = {}
    if heads:
        folds = found_in(find_folds, source, run)
        anatomy = found_in(dissect, source, run, torch.float32)
        found, kept = _heads(folds.folds, anatomy)
    untied = _untied(stream, model)
    plan = RotationPlan(stream, tuple(found), kept, untied)
    _check_on_disk(plan, model, checkpoint)
    return plan


def _heads(folds: Sequence[Fold], anatomy: Anatomy) -> tuple[list[Heads], dict[str, str]]:
    """Heads of all layers that read attention, and why others are left."""
    producers = {
        f"{fold.block}.{reader.layer}": fold
        for fold in folds
        if fold.kind == "linear"
        for reader in fold.readers
    }
    found: list[Heads] = []
    kept = {entry.reader: entry.reason for entry in anatomy.held}
    for entry in anatomy.channels:
        if entry.kind != "heads":
            continue
        fold = producers.get(entry.reader)
        heads = None if fold is None or len(fold.readers) != 1 else _aligned(entry, fold)
        if heads is None:
            kept[entry.reader] = "its heads are no products with the output of one layer"
        else:
            found.append(heads)
    return found, kept


def _aligned(entry: Channels, fold: Fold) -> Heads | None:
    """Heads whose columns read the values' features in the same order; ``None`` where they do not."""
    channels = fold.readers[0].channels
    rows: list[torch.Tensor] = []
    columns: list[torch.Tensor] = []
    for group in entry.groups:
        own = [torch.tensor(part.columns) for part in group.parts]
        first = channels[own[0]]
        if any(not torch.equal(channels[part], first) for part in own):
            return None
        rows.append(fold.rows[first])
        columns += own
    flat = torch.cat(rows)
    if len(flat.unique()) != len(flat) or len(flat) != len(fold.rows):
        return None
    return Heads(fold.name, entry.reader, torch.stack(rows), torch.stack(columns))


def _untied(stream: Stream, model: Any) -> str | None:
    """The head, where it reads the stream with the embedding's weight."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    names: list[str] = [name for name, module in model.named_modules() if module is head]
    return names[0] if names[0] in stream.readers else None


def _check_on_disk(plan: RotationPlan, model: Any, checkpoint: Checkpoint) -> None:
    """Refuse tensors that transformers converts while it loads: they cannot be written as they lie.

    Raises:
        PlanError: naming the first such parameter.
    """
    files: dict[str, list[str]] = {}
    for name in checkpoint.names:
        files.setdefault(checkpoint.target[name], []).append(name)
    layers = {*plan.stream.writers, *plan.stream.readers, *(entry.producer for entry in plan.heads)}
    names = [
        f"{layer}.{leaf}" for layer in layers for leaf, _ in model.get_submodule(layer).named_parameters()
    ]
    names += [f"{norm.name}.{leaf}" for norm in plan.stream.norms for leaf in norm.offsets]
    own_head = {f"{plan.untied}.weight"} if plan.untied else set()
    for name in sorted(set(names) - own_head):
        found = files.get(name, [])
        if len(found) != 1 or checkpoint.shape(found[0]) != tuple(model.get_parameter(name).shape):
            raise PlanError(
                f"{name} is converted while transformers loads it, so it cannot be rotated on disk",
                "save the model with a current transformers first, and rotate that",
            )


def biased(model: Any, norm: Fold) -> bool:
    """Whether every reader of a norm has a bias that can take what the norm adds."""
    paths = [f"{norm.block}.{reader.layer}".removeprefix(".") for reader in norm.readers]
    layers = [model.get_submodule(path) for path in paths]
    return all(is_linear(layer) and layer.bias is not None for layer in layers)
