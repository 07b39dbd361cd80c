"""Taking whole blocks out of a model, from disk to disk.

First it is measured which blocks do least (`compress.sweep.depth_scan`, `compress.sweep.depth_loss`). Then
the blocks that stay are written one after the other under their new numbers, byte for byte where nothing is
repaired. Before a block is written it is run in its new place, in the model that the new configuration
describes, and in its old one, on the hidden state that it will see: both must say the same. What goes is
passed by, as if it added nothing. The stacks of an encoder-decoder are shortened one behind the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, final

import torch

from compress.core.artifact import Artifact
from compress.core.errors import CalibrationError, PlanError, VerificationError
from compress.core.passes import Needs, Outcome
from compress.core.run import CalibrationSource, Run
from compress.models.blocks import Block, Recording, Reentry, hidden_state
from compress.models.checkpoint import Checkpoint
from compress.models.load import skeleton
from compress.models.writers import Writer
from compress.sweep.activations import Activations
from compress.sweep.config_search import changes
from compress.sweep.cutting import Piece, as_they_are, finish_unread, write_pieces
from compress.sweep.depth_choice import Judgement
from compress.sweep.depth_loss import judge_by_loss
from compress.sweep.depth_names import DiskNames, disk_names
from compress.sweep.depth_plan import DepthPlan, plan_depth
from compress.sweep.depth_prediction import predict_depth
from compress.sweep.depth_repair import Refitted, refit, writers_of
from compress.sweep.depth_scan import judge_by_influence, passed
from compress.sweep.depth_stacks import Size
from compress.sweep.memory import return_freed
from compress.sweep.narrow_cuts import ranges
from compress.sweep.narrow_model import NarrowModel
from compress.sweep.rewriting import agree
from compress.sweep.scarcity import scarce, warning
from compress.sweep.unit import UnitRecord
from compress.sweep.walk import OUTSIDE, Walk, outcome_of, placed_skeleton

By = Literal["influence", "loss"]


@dataclass(frozen=True)
class Shorter:
    """What a user wants.

    Attributes:
        size: how many blocks stay.
        by: how blocks are judged.
        repair: whether what stays makes up for what goes.
        samples: calibration sequences that losses are measured on, at most.
    """

    size: Size
    by: By
    repair: bool
    samples: int


def check(asked: Shorter, source: Artifact, run: Run) -> Needs:
    """Settle how many blocks would go, refuse what cannot be, and predict the work.

    Raises:
        PlanError: no block can be taken out, a block cannot be moved or repaired, or calibration text is
            missing.
    """
    if run.calibration is None:
        raise PlanError("the method needs calibration text", "give --calibration TEXT or data.calibration")
    plan = plan_depth(asked.size, source, run)
    model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
    checkpoint = Checkpoint(source, model)
    _disk_names(checkpoint, plan)
    for block, why in plan.held().items():
        run.reporter.message(f"{block} stays: {why}")
    writers = writers_of(source, run, checkpoint) if asked.repair else {}
    measuring = _measuring(asked, run) if asked.by == "loss" else None
    return predict_depth(plan, writers, model, checkpoint, run, measuring)


def shorten(asked: Shorter, source: Artifact, target: Path, run: Run) -> Outcome:
    """Measure which blocks do least, and write the model without them.

    Blocks are computed in float32 on a CPU and in the model's own precision on a GPU; tensors are written
    in the precision that they have on disk.

    Args:
        target: the folder that is written; it may hold earlier progress.

    Raises:
        CalibrationError: hidden states or losses are not finite.
        PlanError: there is no configuration for any selection of blocks.
        VerificationError: a block does not compute in its new place what it does in its old one.
    """
    plan = plan_depth(asked.size, source, run)
    judgement = _judged(asked, plan, source, target, run)
    kept = plan.without(judgement.gone)
    config = plan.config(kept)
    if config is None:
        raise PlanError(f"no configuration has the blocks {ranges(kept)}", "ask for another number of them")
    gone = plan.words(judgement.gone)
    run.reporter.message(
        f"blocks: {plan.stay} of {len(plan.blocks)} stay, {gone} go (by {judgement.measure})"
    )
    walk = _walk(source, target, run)
    writers = writers_of(source, run, walk.checkpoint) if asked.repair else {}
    names = _disk_names(walk.checkpoint, plan)
    outcome = _Shortening(walk, plan, judgement, config, names, writers).apply()
    before, after = plan.count(plan.shapes), plan.count(plan.shapes_of(kept))
    decisions: dict[str, Any] = {
        "blocks": {
            "of": len(plan.blocks),
            "got": plan.stay,
            "gone": gone,
            "by": judgement.measure,
        },
        "config": changes(source.config, config),
        "parameters": {"before": before, "after": after},
        **outcome.decisions,
    }
    if judgement.windows:
        decisions["windows"] = {
            plan.words([start]): f"{value:.6g}" for start, value in sorted(judgement.windows.items())
        }
    return Outcome(decisions, outcome.tensors)


def _walk(source: Artifact, target: Path, run: Run) -> Walk:
    model = placed_skeleton(source, run)
    return Walk(source, target, run, model, Checkpoint(source, model), torch.device(run.device))


def _disk_names(checkpoint: Checkpoint, plan: DepthPlan) -> list[DiskNames]:
    """Where names on disk count blocks, for each stack."""
    return [disk_names(checkpoint, [plan.blocks[n] for n in stack.numbers]) for stack in plan.stacks]


def _judged(asked: Shorter, plan: DepthPlan, source: Artifact, target: Path, run: Run) -> Judgement:
    """Which blocks go; the model that this took is let go again."""
    if asked.by == "influence":
        return judge_by_influence(_walk(source, target, run), plan)
    return judge_by_loss(_walk(source, target, _measuring(asked, run)), plan)


def _measuring(asked: Shorter, run: Run) -> Run:
    """The run with as much text as losses are measured on."""
    text: CalibrationSource | None = run.calibration
    if text is None:
        return run
    return replace(run, calibration=replace(text, samples=min(text.samples, asked.samples)))


@dataclass(frozen=True)
class _Unit:
    """A block that stays, and the blocks beside it that go.

    Attributes:
        number: of the block in the shorter model, over all stacks.
        place: of the block in its stack there.
        before: blocks that go in front of the first one of a stack that stays; empty for all others.
        after: blocks that go behind it.
    """

    number: int
    place: int
    block: Block
    before: tuple[Block, ...]
    after: tuple[Block, ...]


def _units(blocks: Sequence[Block], gone: Sequence[int]) -> list[_Unit]:
    """The blocks that stay, in order, with those that go."""
    units: list[_Unit] = []
    for stack in sorted({block.stack for block in blocks}):
        members = [block for block in blocks if block.stack == stack]
        places = [place for place, block in enumerate(members) if block.position not in gone]
        for number, place in enumerate(places):
            end = places[number + 1] if number + 1 < len(places) else len(members)
            before = tuple(members[:place]) if number == 0 else ()
            units.append(_Unit(len(units), number, members[place], before, tuple(members[place + 1 : end])))
    return units


@final
@dataclass
class _Shortening:
    """One walk over the blocks that stay.

    Attributes:
        walk: the model before the cut on its way.
        plan: how many go.
        judgement: which.
        config: of the shorter model.
        disk: where names on disk count blocks, for each stack.
        writers: what is fitted again in each block; empty where nothing is.
    """

    walk: Walk
    plan: DepthPlan
    judgement: Judgement
    config: Mapping[str, Any]
    disk: Sequence[DiskNames]
    writers: Mapping[str, Writer]
    _small: NarrowModel | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._units = _units(self.walk.blocks, self.judgement.gone)
        self._places = {unit.block.position: unit.number for unit in self._units}
        self._names = {
            unit.block.position: f"{self.plan.stacks[unit.block.stack].path}.{unit.place}"
            for unit in self._units
        }
        # Blocks in front of the first gap see what they saw and say what they said.
        self._first_cut = next(unit.number for unit in self._units if unit.before or unit.after)

    def apply(self) -> Outcome:
        """Write every block that stays, copy the rest, and say what was meant."""
        walk = self.walk
        walk.begin()
        activations = walk.calibration(original=bool(self.writers))
        if activations is None:
            raise CalibrationError("blocks cannot be compared without text", "give --calibration TEXT")
        if not self.writers:
            # One batch is enough to compare a block in its two places.
            activations.shorten(1)
        records: list[UnitRecord] = []
        title = f"{len(self._units)} of {len(walk.blocks)} blocks"
        with (
            walk.reentry() as reentry,
            walk.run.reporter.progress(title, len(self._units) + 1, "block") as advance,
        ):
            walk.load_outside()
            if self.plan.stacks[-1].stay == 1:
                # A lone block is not stopped behind, as a model may run it again: its output meets the head.
                walk.load_head()
            for unit in self._units:
                record = walk.finished(unit.block.name, unit.number)
                records.append(record or self._unit(unit, activations, reentry))
                return_freed()
                advance(1)
            last, rest = len(self._units), as_they_are(walk.outside_names())
            records.append(
                walk.finished(OUTSIDE, last) or finish_unread(walk, OUTSIDE, last, rest, units=last + 1)
            )
            advance(1)
        walk.complete(records, self.config)
        self._warn(records)
        return outcome_of(records, {})

    def _warn(self, records: Sequence[UnitRecord]) -> None:
        # Blocks may have been judged by less text than layers are fitted to.
        repaired = [
            {**row, "tokens": row["repaired_tokens"]}
            for record in records
            for row in record.layers
            if "repaired" in row
        ]
        found = scarce(repaired)
        if found:
            self.walk.run.reporter.message(warning(found, len(repaired)))

    # -- one block ---------------------------------------------------------------------------------

    def _unit(self, unit: _Unit, activations: Activations, reentry: Reentry) -> UnitRecord:
        walk, block = self.walk, unit.block
        event = walk.run.reporter.event
        event("block.start", block=block.name, position=block.position)
        walk.restore(unit.number, activations)
        for gone in unit.before:
            walk.checkpoint.load_module(gone.name, walk.device)
            self._advance_original(gone, activations, reentry)
            self._pass(gone, activations, reentry)
            walk.checkpoint.release(gone.name)
        walk.checkpoint.load_module(block.name, walk.device)
        event("block.compare", block=block.name, position=block.position)
        self._compare(unit, activations.batches[0], activations.recordings[0].held(), reentry)
        self._advance_original(block, activations, reentry)
        if activations.original:
            for gone in unit.after:
                walk.checkpoint.load_module(gone.name, walk.device)
                self._advance_original(gone, activations, reentry)
                walk.checkpoint.release(gone.name)
        made = Refitted()
        if self.writers and unit.number >= self._first_cut:
            event("layer.solve", layer=f"{block.name}.{self.writers[block.name].layer}")
            made = refit(walk, block, self.writers[block.name], activations, reentry)
        for batch, recording in zip(activations.batches, activations.recordings, strict=True):
            reentry.advance(block.position, batch, recording)
        walk.checkpoint.release(block.name)
        for gone in unit.after:
            walk.checkpoint.load_module(gone.name, walk.device)
            self._pass(gone, activations, reentry)
            walk.checkpoint.release(gone.name)
        rows = [self._row(each) for each in (*unit.before, block, *unit.after)]
        rows[len(unit.before)] |= made.row
        record = write_pieces(walk, unit.number, self._pieces(unit, made), rows, units=len(self._units) + 1)
        walk.finish(unit.number, record, activations)
        return record

    def _advance_original(self, block: Block, activations: Activations, reentry: Reentry) -> None:
        """Run the original model's recordings through a block that is in memory as it was."""
        for batch, recording in zip(activations.batches, activations.original, strict=False):
            reentry.advance(block.position, batch, recording)

    def _pass(self, block: Block, activations: Activations, reentry: Reentry) -> None:
        """Take the shorter model's recordings past a block that goes."""
        for batch, recording in zip(activations.batches, activations.recordings, strict=True):
            passed(reentry, block, batch, recording)

    def _row(self, block: Block) -> dict[str, Any]:
        """What the table of layers says of a block, whether it stays or goes."""
        row: dict[str, Any] = {
            "layer": block.name,
            "becomes": self._names.get(block.position, ""),
            "tokens": self.judgement.tokens,
        }
        if block.position in self.judgement.blocks:
            row[self.judgement.measure] = f"{self.judgement.blocks[block.position]:.6g}"
        return row

    # -- proof and writing -----------------------------------------------------------------------------

    def _compare(
        self, unit: _Unit, batch: Mapping[str, torch.Tensor], recording: Recording, reentry: Reentry
    ) -> None:
        """Hold a block in its new place against the same block in its old one, on one batch."""
        walk, block = self.walk, unit.block
        compute = walk.model.dtype
        if self._small is None:
            self._small = NarrowModel(self.config, walk, compute)
        weights = {
            f"{self._names[block.position]}.{name}": parameter.detach()
            for name, parameter in block.module.named_parameters()
        }
        extras = {
            self._places[position]: values
            for position, values in recording.extras.items()
            if position in self._places
        }
        moved = self._small.run(unit.number, weights, batch, Recording(dict(recording.hidden), extras))
        stayed = reentry.run(block.position, batch, recording)
        same, words = agree(hidden_state(stayed), hidden_state(moved), compute)
        if not same:
            raise VerificationError(
                f"{block.name} as {self._names[block.position]} is {words} in its old place",
                "the architecture computes by the number of a block in a way that was not seen: report it, "
                "and prune its width with prune.width",
            )

    def _pieces(self, unit: _Unit, made: Refitted) -> dict[str, Piece]:
        """The tensors of a block that stays, by the names that they get on disk."""
        checkpoint, disk = self.walk.checkpoint, self.disk[unit.block.stack]
        pieces: dict[str, Piece] = {}
        for name in checkpoint.names_of(unit.block.name):
            if name in checkpoint.passed_over:
                continue
            parameter, new = checkpoint.target[name], disk.renumbered(name, unit.place)
            fitted, error = made.tensors.get(parameter), made.errors.get(parameter, 0.0)
            # Another block had this name, so other values have it now.
            pieces[new] = Piece(name, moved=new != name, fitted=fitted, error=error)
        return pieces
