"""Taking whole channels and heads out of a model, block by block, from disk to disk.

A block is brought into memory, the calibration batches run through it once, and the inputs in front of the
layers that read channels or heads say which of them matter. The weights of the others are cut out of the
tensors as they lie on disk, so what stays is the same to the bit. Then one batch is run through the narrower
block and through the block as it was with the cut columns at zero: both must say the same.

The importance is that of the model as it was: every block sees what it saw before anything was cut. One
pass over the text is enough then, and no block is judged by the damage of another (Minitron, section 2.2).

Channels of the residual stream are the same in all blocks, so they are chosen first, in a pass of their own
(`compress.sweep.narrow_importance`).

A repair fits the layers in front of which something went to their outputs before
(`compress.sweep.narrow_repair`). It changes values after the comparison, which is about the cut alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from compress.core.artifact import Artifact
from compress.core.errors import CalibrationError, PlanError
from compress.core.passes import Needs, Outcome
from compress.core.run import Run
from compress.models.blocks import Block, Reentry, find_blocks
from compress.models.channels import Channels
from compress.models.checkpoint import Checkpoint
from compress.models.load import loaded_dtype, skeleton
from compress.models.probe import input_features, output_features
from compress.numerics.masks import PartImportance, strongest
from compress.sweep.activations import Activations
from compress.sweep.config_search import changes
from compress.sweep.cutting import write_pieces
from compress.sweep.decode_prediction import decode_prediction, read_bytes
from compress.sweep.narrow_cuts import (
    Cut,
    Kept,
    check_on_disk,
    complement,
    cuts_of,
    merged,
    ranges,
)
from compress.sweep.narrow_importance import By, Importance, check_importance, judge
from compress.sweep.narrow_model import KeptStream
from compress.sweep.narrow_plan import NAMES, Asked, NarrowPlan, plan_narrowing, reduction
from compress.sweep.narrow_proof import Proof
from compress.sweep.narrow_repair import (
    ReaderInputs,
    Repaired,
    StreamInputs,
    pieces_of,
    repaired,
    stacked,
    with_repair,
    with_way_back,
)
from compress.sweep.prediction import predict_narrowing
from compress.sweep.scarcity import scarce, warning
from compress.sweep.unit import UnitRecord
from compress.sweep.walk import OUTSIDE, Walk, outcome_of, placed_skeleton


@dataclass(frozen=True)
class How:
    """How channels and heads are chosen and what follows.

    Attributes:
        by: what they count by.
        repair: whether layers are fitted again to what their inputs lost.
    """

    by: By = "activation"
    repair: bool = False


def check(asked: Asked, how: How, source: Artifact, run: Run) -> Needs:
    """Settle what would be cut, refuse what cannot be, and predict the work.

    Raises:
        PlanError: nothing can be cut, a tensor on disk cannot be cut, or calibration text is missing.
    """
    if run.calibration is None:
        raise PlanError("the method needs calibration text", "give --calibration TEXT or data.calibration")
    check_importance(how.by, source, run)
    plan = plan_narrowing(asked, source, run)
    model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
    checkpoint = Checkpoint(source, model)
    check_on_disk(plan.shapes, model, checkpoint)
    # The stream is judged in a pass of its own; gradients take two more to go back.
    passes = 1.0 + (plan.hidden is not None) + 3.0 * (how.by == "taylor")
    needs = predict_narrowing(plan.shapes, find_blocks(model), model, checkpoint, run, passes=passes)
    if how.by == "taylor":
        needs = with_way_back(needs, model, checkpoint, run)
    if not how.repair:
        return needs
    readers = [entry.reader for entry in plan.channels]
    if plan.hidden is not None:
        readers += sorted(plan.hidden.residual.readers)
    return with_repair(needs, readers, model, run)


def narrow(asked: Asked, how: How, source: Artifact, target: Path, run: Run) -> Outcome:
    """Cut the least important channels and heads out of every block.

    Blocks are computed in float32 on a CPU and in the model's own precision on a GPU; tensors are written
    in the precision that they have on disk.

    Args:
        target: the folder that is written; it may hold earlier progress.

    Raises:
        CalibrationError: no data reached a layer, or its inputs are not finite.
        VerificationError: a narrower block does not compute what the wide one does without its channels.
    """
    device = torch.device(run.device)
    plan = plan_narrowing(asked, source, run)
    for line in _said(plan):
        run.reporter.message(line)
    model = placed_skeleton(source, run)
    checkpoint = Checkpoint(source, model)
    check_on_disk(plan.shapes, model, checkpoint)
    walk = Walk(source, target, run, model, checkpoint, device)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    size = loaded_dtype(source).itemsize
    read = {"before": read_bytes(model, shapes, size), "after": read_bytes(model, plan.shapes, size)}
    importance = judge(walk, plan, how.by)
    stream = None
    if plan.hidden is not None and importance.hidden is not None:
        kept = strongest(importance.hidden, plan.hidden.count)
        stream = KeptStream(plan.hidden, kept, model)
    outcome = _Narrowing(walk, plan, how, importance, stream, model.dtype).apply()
    before, after = reduction(shapes, plan.shapes)
    changed = changes(source.config, plan.config)
    decisions = {
        "shape": {NAMES[axis]: verdict.document(axis) for axis, verdict in plan.verdicts.items()},
        "missing": {NAMES[kind]: why for kind, why in plan.missing.items()},
        "importance": how.by,
        "config": changed,
        "parameters": {"before": before, "after": after},
        "decode": decode_prediction(read["before"], read["after"]),
        **({"hidden_kept": ranges(stream.kept.tolist())} if stream is not None else {}),
        **outcome.decisions,
    }
    return Outcome(decisions, outcome.tensors)


def _said(plan: NarrowPlan) -> list[str]:
    """What a person should know of the shape before it is made."""
    lines = []
    for kind, verdict in plan.verdicts.items():
        note = f" ({verdict.note})" if verdict.note else ""
        where = "" if kind == "hidden" else " in each block"
        lines.append(
            f"{NAMES[kind]}: asked for {verdict.asked} of {verdict.of}{where}, got {verdict.got}{note}"
        )
    lines += [f"{NAMES[kind]}: none can be taken out ({why})" for kind, why in plan.missing.items()]
    return lines


@final
@dataclass
class _Narrowing:
    """One walk over the blocks.

    Attributes:
        walk: the wide model on its way.
        plan: what goes.
        how: what it is chosen by, and whether layers are fitted again.
        importance: what was measured before.
        stream: channels of the residual stream that stay; ``None`` where all do.
        compute: precision of the blocks.
    """

    walk: Walk
    plan: NarrowPlan
    how: How
    importance: Importance
    stream: KeptStream | None
    compute: torch.dtype
    _proof: Proof = field(init=False)

    def __post_init__(self) -> None:
        self._proof = Proof(self.walk, self.plan.config, self.stream, self.compute)

    def apply(self) -> Outcome:
        """Narrow every block, copy the rest, and say what was meant."""
        walk = self.walk
        walk.begin()
        activations = walk.calibration()
        if activations is None:
            raise CalibrationError("channels cannot be judged without text", "give --calibration TEXT")
        title = f"{len(self.plan.channels)} layers in {len(walk.blocks)} blocks"
        with walk.reentry() as reentry:
            walk.load_outside()
            records = walk.through(
                title,
                lambda block: self._block(block, activations, reentry),
                lambda: self._outside(activations, reentry),
            )
        walk.complete(records, self.plan.config)
        if self.how.repair:
            _warn(walk.run, [row for record in records for row in record.layers])
        return outcome_of(records, {})

    def _block(self, block: Block, activations: Activations, reentry: Reentry) -> UnitRecord:
        walk = self.walk
        event = walk.run.reporter.event
        event("block.start", block=block.name, position=block.position)
        walk.restore(block.position, activations)
        walk.checkpoint.load_module(block.name, walk.device)
        members = [entry for entry in self.plan.channels if entry.reader.startswith(f"{block.name}.")]
        event("block.calibrate", block=block.name, position=block.position)
        # What the check needs is held before the recordings go on to the output of this block.
        first = activations.recordings[0].held()
        repair = self.how.repair
        read = {entry.reader: ReaderInputs(walk, entry.reader) for entry in members} if repair else {}
        streams = StreamInputs.of_block(walk, self.plan.hidden, self.stream, block) if repair else []
        with stacked(streams):
            gathered = self._gather(block, members, activations, reentry, read)
        made: dict[str, Repaired] = {}
        cuts: dict[str, Cut] = self._stream_cuts(block.name)
        zeroed: dict[str, torch.Tensor] = {}
        layers: list[dict[str, Any]] = []
        for entry in members:
            event("layer.solve", layer=entry.reader)
            kept, row = self._chosen(entry, gathered[entry.reader])
            layers.append(row)
            if repair:
                made[entry.reader] = repaired(walk, entry.reader, kept.columns, read.pop(entry.reader))
                row |= made[entry.reader].row
            zeroed[entry.reader] = complement(
                kept.columns, input_features(walk.model.get_submodule(entry.reader))
            )
            for cut in cuts_of(walk.model, entry, kept):
                cuts = merged(cuts, {cut.parameter: cut})
        for stream in streams:
            event("layer.solve", layer=stream.reader)
            made[stream.reader] = stream.repaired()
            layers.append(dict(made[stream.reader].row))
        if members or self.stream is not None:
            event("block.compare", block=block.name, position=block.position)
            self._proof.block(block, cuts, zeroed, activations.batches[0], first, reentry)
        walk.checkpoint.release(block.name)
        names = walk.checkpoint.names_of(block.name)
        record = write_pieces(walk, block.position, pieces_of(walk, names, cuts, made), layers)
        walk.finish(block.position, record, activations)
        return record

    def _outside(self, activations: Activations, reentry: Reentry) -> UnitRecord:
        walk = self.walk
        position = len(walk.blocks)
        walk.run.reporter.event("block.start", block=OUTSIDE, position=position)
        cuts = {} if self.stream is None else dict(self.stream.cuts)
        if self.stream is not None:
            walk.restore(position, activations)
            walk.run.reporter.event("block.compare", block=OUTSIDE, position=position)
            self._proof.outside(activations.batches[0], activations.recordings[0], reentry)
        record = write_pieces(walk, position, pieces_of(walk, walk.outside_names(), cuts, {}), [])
        walk.finish(position, record, None)
        return record

    def _stream_cuts(self, block: str) -> dict[str, Cut]:
        """What stays of the parameters of a block without channels of the residual stream."""
        if self.stream is None:
            return {}
        return {name: cut for name, cut in self.stream.cuts.items() if name.startswith(f"{block}.")}

    # -- importance ----------------------------------------------------------------------------------

    def _gather(
        self,
        block: Block,
        members: Sequence[Channels],
        activations: Activations,
        reentry: Reentry,
        read: Mapping[str, ReaderInputs],
    ) -> dict[str, PartImportance]:
        """Run every batch once: the importance of all parts, and the recordings one block further.

        Args:
            read: takes in what the layers read; empty where nothing is repaired.
        """
        gathered = {
            entry.reader: PartImportance(
                torch.tensor([part.columns for group in entry.groups for part in group.parts]),
                self.walk.device,
            )
            for entry in members
        }

        def watch(reader: str, importance: PartImportance) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                inputs: torch.Tensor = args[0]
                for sequence in inputs.reshape(-1, *inputs.shape[-2:]):
                    importance.add(sequence)
                if reader in read:
                    read[reader].add(inputs)

            return hook

        handles = [
            self.walk.model.get_submodule(reader).register_forward_pre_hook(watch(reader, importance))
            for reader, importance in gathered.items()
        ]
        try:
            for batch, recording in zip(activations.batches, activations.recordings, strict=True):
                reentry.advance(block.position, batch, recording)
        finally:
            for handle in handles:
                handle.remove()
        return gathered

    def _chosen(self, entry: Channels, gathered: PartImportance) -> tuple[Kept, dict[str, Any]]:
        """Which groups and parts stay in front of one layer, and its row in the table."""
        try:
            carried = gathered.importance
        except CalibrationError as error:
            raise CalibrationError(f"{entry.reader}: {error.message}", error.hint) from error
        importance = self.importance.parts.get(entry.reader, carried)
        verdict = self.plan.verdicts[entry.kind]
        groups, parts, _ = entry.shape
        scores = importance.reshape(groups, parts)
        kept_groups = strongest(scores.square().sum(1), verdict.kept[0]).tolist()
        kept = {group: strongest(scores[group], verdict.kept[1]).tolist() for group in kept_groups}
        staying = Kept(entry, kept)
        total = float(importance.sum())
        held = sum(float(scores[group, part]) for group, chosen in kept.items() for part in chosen)
        numbers = [group * parts + part for group, chosen in kept.items() for part in chosen]
        row = {
            "layer": entry.reader,
            "kind": NAMES[entry.kind],
            "rows": self._rows(entry.reader),
            "columns": len(staying.columns),
            "tokens": gathered.tokens,
            "parts": verdict.of,
            "kept": ranges(numbers),
            "kept_parts": len(numbers),
            "importance": f"{held / total if total > 0 else 1.0:.6g}",
        }
        return staying, row

    def _rows(self, layer: str) -> int:
        """Output features of a layer in the narrower model."""
        rows = output_features(self.walk.model.get_submodule(layer))
        residual = None if self.plan.hidden is None else self.plan.hidden.residual
        writes = residual is not None and layer in residual.writers
        return self.plan.hidden.count if writes and self.plan.hidden is not None else rows


def _warn(run: Run, layers: Sequence[Mapping[str, Any]]) -> None:
    """Name layers that were fitted to fewer tokens than they have inputs."""
    found = scarce(layers)
    if found:
        run.reporter.message(warning(found, len(layers)))
