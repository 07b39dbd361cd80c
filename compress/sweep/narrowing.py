"""Taking whole channels and heads out of a model, block by block, from disk to disk.

A block is brought into memory, the calibration batches run through it once, and the inputs in front of the
layers that read channels or heads say which of them matter. The weights of the others are cut out of the
tensors as they lie on disk, so what stays is the same to the bit. Then one batch is run through the narrower
block and through the block as it was with the cut columns at zero: both must say the same.

The importance is that of the model as it was: every block sees what it saw before anything was cut. One
pass over the text is enough then, and no block is judged by the damage of another (Minitron, section 2.2).

A repair fits the layers in front of which something went to their outputs before
(`compress.sweep.narrow_repair`). It changes values after the comparison, which is about the cut alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from compress.core.artifact import Artifact
from compress.core.errors import CalibrationError, PlanError, VerificationError
from compress.core.passes import Meant, Needs, Outcome
from compress.core.run import Run
from compress.formats.shards import shard_name, write_shard
from compress.models.blocks import Block, Recording, Reentry, find_blocks, hidden_state
from compress.models.channels import Channels, Kind
from compress.models.checkpoint import Checkpoint
from compress.models.load import loaded_dtype, skeleton
from compress.models.probe import input_features, output_features
from compress.numerics.fingerprint import fingerprint
from compress.numerics.masks import PartImportance, strongest
from compress.sweep.activations import Activations
from compress.sweep.narrow_cuts import (
    Cut,
    Kept,
    check_on_disk,
    complement,
    cuts_of,
    joined,
    ranges,
)
from compress.sweep.narrow_model import NarrowModel
from compress.sweep.narrow_plan import Asked, NarrowPlan, plan_narrowing, reduction
from compress.sweep.narrow_repair import ReaderInputs, Repaired, repaired, with_repair
from compress.sweep.prediction import predict_narrowing
from compress.sweep.rewriting import agree
from compress.sweep.scarcity import scarce, warning
from compress.sweep.unit import UnitRecord
from compress.sweep.walk import OUTSIDE, Walk, decided, placed_skeleton


def check(asked: Asked, source: Artifact, run: Run, *, repair: bool = False) -> Needs:
    """Settle what would be cut, refuse what cannot be, and predict the work.

    Args:
        repair: whether layers are fitted again to what their inputs lost.

    Raises:
        PlanError: nothing can be cut, a tensor on disk cannot be cut, or calibration text is missing.
    """
    if run.calibration is None:
        raise PlanError("the method needs calibration text", "give --calibration TEXT or data.calibration")
    plan = plan_narrowing(asked, source, run)
    model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
    checkpoint = Checkpoint(source, model)
    check_on_disk(plan.shapes, model, checkpoint)
    needs = predict_narrowing(plan.shapes, find_blocks(model), model, checkpoint, run)
    if not repair:
        return needs
    return with_repair(needs, (entry.reader for entry in plan.channels), model, run)


def narrow(asked: Asked, source: Artifact, target: Path, run: Run, *, repair: bool = False) -> Outcome:
    """Cut the least important channels and heads out of every block.

    Blocks are computed in float32 on a CPU and in the model's own precision on a GPU; tensors are written
    in the precision that they have on disk.

    Args:
        target: the folder that is written; it may hold earlier progress.
        repair: whether layers are fitted again to what their inputs lost.

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
    outcome = _Narrowing(walk, plan, model.dtype, repair).apply()
    before, after = reduction(shapes, plan.shapes)
    changed = {
        name: value for name, value in plan.config.items() if source.config.get(name, _ABSENT) != value
    }
    decisions = {
        "shape": {_NAMES[kind]: verdict.document(kind) for kind, verdict in plan.verdicts.items()},
        "missing": {_NAMES[kind]: why for kind, why in plan.missing.items()},
        "config": changed,
        "parameters": {"before": before, "after": after},
        **outcome.decisions,
    }
    return Outcome(decisions, outcome.tensors)


_ABSENT = object()
_NAMES: Mapping[Kind, str] = {"channels": "mlp", "heads": "heads"}


def _said(plan: NarrowPlan) -> list[str]:
    """What a person should know of the shape before it is made."""
    lines = []
    for kind, verdict in plan.verdicts.items():
        note = f" ({verdict.note})" if verdict.note else ""
        lines.append(
            f"{_NAMES[kind]}: asked for {verdict.asked} of {verdict.of} in each block, "
            f"got {verdict.got}{note}"
        )
    lines += [f"{_NAMES[kind]}: none can be taken out ({why})" for kind, why in plan.missing.items()]
    return lines


@final
@dataclass
class _Narrowing:
    """One walk over the blocks.

    Attributes:
        walk: the wide model on its way.
        plan: what goes.
        compute: precision of the blocks.
        repair: whether layers are fitted again.
    """

    walk: Walk
    plan: NarrowPlan
    compute: torch.dtype
    repair: bool
    _small: NarrowModel | None = field(default=None, init=False)

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
                title, lambda block: self._block(block, activations, reentry), self._outside
            )
        walk.complete(records, self.plan.config)
        if self.repair:
            _warn(walk.run, [row for record in records for row in record.layers])
        return self._outcome(records)

    def _outcome(self, records: Sequence[UnitRecord]) -> Outcome:
        tensors = {name: meant for record in records for name, meant in record.tensors.items()}
        layers = [row for record in records for row in record.layers]
        decisions = {
            "changed": sum(meant.changed for meant in tensors.values()),
            "layers": decided(layers),
        }
        return Outcome(decisions, tensors)

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
        read = {entry.reader: ReaderInputs(walk, entry.reader) for entry in members} if self.repair else {}
        gathered = self._gather(block, members, activations, reentry, read)
        made: dict[str, Repaired] = {}
        cuts: dict[str, Cut] = {}
        zeroed: dict[str, torch.Tensor] = {}
        layers: list[dict[str, Any]] = []
        for entry in members:
            event("layer.solve", layer=entry.reader)
            kept, row = self._chosen(entry, gathered[entry.reader])
            layers.append(row)
            if self.repair:
                made[entry.reader] = repaired(walk, entry.reader, kept.columns, read.pop(entry.reader))
                row |= made[entry.reader].row
            zeroed[entry.reader] = complement(
                kept.columns, input_features(walk.model.get_submodule(entry.reader))
            )
            for cut in cuts_of(walk.model, entry, kept):
                before = cuts.get(cut.parameter)
                cuts[cut.parameter] = cut if before is None else joined(before, cut)
        if members:
            event("block.compare", block=block.name, position=block.position)
            self._compare(block, cuts, zeroed, activations.batches[0], first, reentry)
        walk.checkpoint.release(block.name)
        record = self._write(block.position, walk.checkpoint.names_of(block.name), cuts, layers, made)
        walk.finish(block.position, record, activations)
        return record

    def _outside(self) -> UnitRecord:
        walk = self.walk
        position = len(walk.blocks)
        walk.run.reporter.event("block.start", block=OUTSIDE, position=position)
        record = self._write(position, walk.outside_names(), {}, [], {})
        walk.finish(position, record, None)
        return record

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
            importance = gathered.importance
        except CalibrationError as error:
            raise CalibrationError(f"{entry.reader}: {error.message}", error.hint) from error
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
            "kind": _NAMES[entry.kind],
            "rows": output_features(self.walk.model.get_submodule(entry.reader)),
            "columns": len(staying.columns),
            "tokens": gathered.tokens,
            "parts": verdict.of,
            "kept": ranges(numbers),
            "kept_parts": len(numbers),
            "importance": f"{held / total if total > 0 else 1.0:.6g}",
        }
        return staying, row

    # -- proof and writing -----------------------------------------------------------------------------

    def _compare(
        self,
        block: Block,
        cuts: Mapping[str, Cut],
        zeroed: Mapping[str, torch.Tensor],
        batch: Mapping[str, torch.Tensor],
        recording: Recording,
        reentry: Reentry,
    ) -> None:
        """Hold the narrower block against the wide one whose cut columns are zero, on one batch."""
        walk = self.walk
        if self._small is None:
            self._small = NarrowModel(self.plan.config, walk, self.compute)
        inside = f"{block.name}."
        weights = {
            name: cuts[name].of(parameter.detach()) if name in cuts else parameter.detach()
            for name, parameter in walk.model.named_parameters()
            if name.startswith(inside)
        }
        narrow_output = self._small.run(block.position, weights, batch, recording)
        handles = [
            walk.model.get_submodule(reader).register_forward_pre_hook(_zeroing(columns))
            for reader, columns in zeroed.items()
        ]
        try:
            wide_output = reentry.run(block.position, batch, recording)
        finally:
            for handle in handles:
                handle.remove()
        same, words = agree(hidden_state(wide_output), hidden_state(narrow_output), self.compute)
        if not same:
            raise VerificationError(
                f"{block.name} is {words} with the same channels at zero",
                "its channels depend on one another in a way that was not seen: report this architecture; "
                "--heads 1 or --mlp 1 may leave out what does it",
            )

    def _write(
        self,
        position: int,
        names: Sequence[str],
        cuts: Mapping[str, Cut],
        layers: list[dict[str, Any]],
        made: Mapping[str, Repaired],
    ) -> UnitRecord:
        """Write one shard: cut tensors cut and fitted again, all others byte for byte."""
        checkpoint, run = self.walk.checkpoint, self.walk.run
        file = shard_name(position, len(self.walk.blocks) + 1)
        loaded = loaded_dtype(self.walk.source)
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name in names:
            target = checkpoint.target[name]
            shape = self.plan.shapes[target] if target in cuts else checkpoint.shape(name)
            layout[name] = (checkpoint.dtype(name), shape)
        meant: dict[str, Meant] = {}

        def bring(name: str) -> torch.Tensor:
            tensor, target = checkpoint.tensor(name), checkpoint.target[name]
            cut = cuts.get(target)
            written = _written(tensor, target, cut, made)
            if written is None:
                meant[name] = Meant(fingerprint(tensor), False)
                return tensor
            # A loader sees the values in the precision that the configuration names.
            meant[name] = Meant(fingerprint(written.to(loaded)), True, _distance(tensor, cut, written))
            return written

        size = write_shard(
            self.walk.target / file,
            layout,
            bring,
            lambda name: run.reporter.event("shard.tensor", file=file, tensor=name),
        )
        return UnitRecord(file, sorted(layout), size, dict(sorted(meant.items())), layers)


def _zeroing(columns: torch.Tensor) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs = args[0].clone()
        inputs[..., columns.to(inputs.device)] = 0
        return (inputs, *args[1:])

    return hook


def _written(
    tensor: torch.Tensor, target: str, cut: Cut | None, made: Mapping[str, Repaired]
) -> torch.Tensor | None:
    """What is written in place of a tensor, cut and fitted again; ``None`` where it stays.

    Args:
        target: name of its parameter.
        made: layers that were fitted again, by path.
    """
    layer, _, leaf = target.rpartition(".")
    again = made.get(layer)
    if again is not None and leaf == "weight" and cut is not None:
        return again.cut(cut)
    if again is not None and leaf == "bias" and again.bias is not None:
        return again.bias if cut is None else cut.of(again.bias)
    return None if cut is None else cut.of(tensor)


def _distance(tensor: torch.Tensor, cut: Cut | None, written: torch.Tensor) -> float:
    """Relative Frobenius distance to a tensor of what is left of it, with zeros where it was cut."""
    kept = tensor if cut is None else cut.of(tensor)
    whole, stays = _square(tensor), _square(kept)
    lost = max(0.0, whole - stays) + _square(written.float() - kept.float())
    return math.sqrt(lost / whole) if whole else math.sqrt(lost)


def _square(tensor: torch.Tensor) -> float:
    return float(tensor.float().square().sum(dtype=torch.float64))


def _warn(run: Run, layers: Sequence[Mapping[str, Any]]) -> None:
    """Name layers that were fitted to fewer tokens than they have inputs."""
    found = scarce(layers)
    if found:
        run.reporter.message(warning(found, len(layers)))
