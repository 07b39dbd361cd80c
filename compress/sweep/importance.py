"""How much the parts of a model do: its blocks, their heads and the channels of their MLPs.

Nothing is cut; these are the measures by which `prune.depth` and `prune.width` choose. A block is measured by
how far it turns the hidden state (`compress.numerics.similarity`), and by what the model's output loses
without it (`compress.sweep.depth_loss`). A head or a channel is measured by its activations in front of the
layer that reads it (`compress.numerics.masks`), and on request by what the loss changes without it to first
order (`compress.sweep.first_terms`).

Activations take one pass with one block in memory. Losses and gradients take the whole model. The decoder of
an encoder-decoder reads the same text as its encoder, and its loss is the divergence from what it said.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compress.core.artifact import Artifact
from compress.core.errors import CalibrationError, PlanError
from compress.core.run import Run
from compress.models.architecture import found_in
from compress.models.blocks import Block, Reentry
from compress.models.channels import Channels, Kind, dissect
from compress.models.checkpoint import Checkpoint
from compress.models.tasks import TextGeneration, resolve
from compress.numerics.masks import PartImportance
from compress.numerics.similarity import Influence
from compress.sweep.activations import Activations
from compress.sweep.depth_loss import losses_alone
from compress.sweep.depth_scan import arriving
from compress.sweep.first_terms import first_terms
from compress.sweep.memory import return_freed
from compress.sweep.walk import Walk, placed_skeleton


@dataclass(frozen=True)
class BlockImportance:
    """What one block does.

    Attributes:
        block: its path.
        influence: one minus the mean cosine of what goes in and what comes out.
        loss: of the model without it; ``None`` where that was not measured, or is not finite.
    """

    block: str
    influence: float
    loss: float | None = None


@dataclass(frozen=True)
class PartsImportance:
    """What the heads of one attention, or the channels of one MLP, do.

    Attributes:
        layer: that reads them.
        kind: ``heads`` or ``channels``.
        groups: heads that share keys and values lie together, in so many groups; all channels are alone.
        activation: of each part, in the order of the layer's inputs.
        taylor: likewise; ``None`` where that was not measured.
    """

    layer: str
    kind: Kind
    groups: int
    activation: tuple[float, ...]
    taylor: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Importance:
    """What was measured of a model.

    Attributes:
        blocks: in order.
        parts: in the order of the model.
        loss: of the whole model; ``None`` where losses were not measured.
        tokens: of the text.
        unmeasured: layers whose inputs belong to no head and no channel, with the reason.
    """

    blocks: tuple[BlockImportance, ...]
    parts: tuple[PartsImportance, ...]
    loss: float | None
    tokens: int
    unmeasured: Mapping[str, str] = field(default_factory=dict)


def measure_importance(source: Artifact, run: Run, *, loss: bool = True, taylor: bool = False) -> Importance:
    """Measure blocks, heads and channels on calibration text.

    Args:
        source: the model.
        run: with calibration text.
        loss: whether the model is run without each block.
        taylor: whether gradients of the loss are taken.

    Raises:
        CalibrationError: a hidden state, a loss or a gradient is not finite.
        ModelError: the model has no stack of blocks.
        PlanError: the run has no calibration text, or what was asked for cannot be measured of this model.
    """
    _require(source, run, taylor=taylor)
    anatomy = found_in(dissect, source, run, torch.float32)
    walk = _walk(source, run)
    influences, parts, tokens = _activations(walk, anatomy.channels)
    whole, measured = losses_alone(_walk(source, run)) if loss else (None, {})
    alone = {number: value for number, value in measured.items() if math.isfinite(value)}
    columns = {entry.reader: _columns(entry) for entry in anatomy.channels}
    gradients = first_terms(_walk(source, run), columns) if taylor else {}
    blocks = tuple(
        BlockImportance(block.name, influences[block.name], alone.get(block.position))
        for block in walk.blocks
    )
    entries = tuple(
        PartsImportance(
            entry.reader,
            entry.kind,
            entry.shape[0],
            parts[entry.reader],
            tuple(gradients[entry.reader].tolist()) if entry.reader in gradients else None,
        )
        for entry in anatomy.channels
    )
    unmeasured = {entry.reader: entry.reason for entry in anatomy.held}
    return Importance(blocks, entries, whole, tokens, unmeasured)


def _require(source: Artifact, run: Run, *, taylor: bool) -> None:
    """Refuse before any work what could not be measured after it."""
    if run.calibration is None:
        raise PlanError("importance is measured on calibration text", "give --calibration TEXT")
    task = resolve(run.task, source.config)
    if taylor and not isinstance(task, TextGeneration):
        raise PlanError(
            f"gradients are those of the next token's loss, which a model for {task.name} does not have",
            "leave --taylor out",
        )


def _walk(source: Artifact, run: Run) -> Walk:
    model = placed_skeleton(source, run)
    return Walk(source, run.scratch, run, model, Checkpoint(source, model), torch.device(run.device))


def _drawn(walk: Walk) -> Activations:
    activations = walk.calibration()
    if activations is None:
        raise PlanError("importance is measured on calibration text", "give --calibration TEXT")
    return activations


# -- one pass over the text --------------------------------------------------------------------------


def _activations(
    walk: Walk, channels: Sequence[Channels]
) -> tuple[dict[str, float], dict[str, tuple[float, ...]], int]:
    """The influence of blocks by path, the importance of parts by reader, and the number of tokens."""
    activations = _drawn(walk)
    walk.begin()
    influences: dict[str, float] = {}
    parts: dict[str, tuple[float, ...]] = {}
    title = f"activations of {len(walk.blocks)} blocks"
    with (
        walk.reentry() as reentry,
        walk.run.reporter.progress(title, len(walk.blocks), "block") as advance,
    ):
        walk.load_outside()
        for block in walk.blocks:
            walk.run.reporter.event("block.start", block=block.name, position=block.position)
            members = [entry for entry in channels if entry.block == block.name]
            influence, gathered = _block(walk, block, members, activations, reentry)
            try:
                influences[block.name] = influence.value
                parts |= {name: tuple(found.importance.tolist()) for name, found in gathered.items()}
            except CalibrationError as error:
                raise CalibrationError(f"{block.name}: {error.message}", error.hint) from error
            return_freed()
            advance(1)
    walk.checkpoint.release("")
    return influences, parts, sum(batch["input_ids"].numel() for batch in activations.batches)


def _block(
    walk: Walk, block: Block, members: Sequence[Channels], activations: Activations, reentry: Reentry
) -> tuple[Influence, dict[str, PartImportance]]:
    walk.checkpoint.load_module(block.name, walk.device)
    influence = Influence()
    gathered = {entry.reader: PartImportance(_columns(entry), walk.device) for entry in members}

    def watch(importance: PartImportance) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            for sequence in args[0].reshape(-1, *args[0].shape[-2:]):
                importance.add(sequence)

        return hook

    with ExitStack() as hooks:
        for reader, importance in gathered.items():
            handle = walk.model.get_submodule(reader).register_forward_pre_hook(watch(importance))
            hooks.callback(handle.remove)
        for batch, recording in zip(activations.batches, activations.recordings, strict=True):
            with arriving(block.module) as arrived:
                reentry.advance(block.position, batch, recording)
            influence.add(arrived.hidden, recording.hidden[block.stack])
    walk.checkpoint.release(block.name)
    return influence, gathered


def _columns(entry: Channels) -> torch.Tensor:
    """int64 ``[parts, width]``: the input columns of each part."""
    return torch.tensor([part.columns for group in entry.groups for part in group.parts])
