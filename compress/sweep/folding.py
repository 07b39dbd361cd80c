"""Moving factors from a layer's input into what produces it, block by block, from disk to disk.

A block is brought into memory, the calibration batches run through it, and a smoother chooses the factors of
each fold (`compress.models.folds`) from the statistic of the readers' input. Factors of different folds do
not disturb one another: dividing a row of a layer leaves the error of rounding it, relative to the row, as it
is. So all are chosen on the block as it was. Before a block is written, its factors are put into it in memory
and one batch is run: it must say what it said before. What follows sees the block as it was, because it
computes the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, final

import torch

from compress.core.artifact import Artifact
from compress.core.errors import CalibrationError, PlanError, VerificationError
from compress.core.passes import Needs, Outcome
from compress.core.patterns import matches_any
from compress.core.run import Run
from compress.models.architecture import found_in
from compress.models.blocks import Block, Recording, Reentry, find_blocks, hidden_state
from compress.models.checkpoint import Checkpoint
from compress.models.fold_search import find_folds
from compress.models.folds import Fold, Folds, Reader, Rescaling
from compress.models.load import loaded_dtype, skeleton
from compress.models.probe import input_features, output_features
from compress.numerics.smoothing import Reading
from compress.sweep.activations import Activations
from compress.sweep.collector import Collector, Enough, Shared
from compress.sweep.folding_pass import Smoother, Solved
from compress.sweep.folding_prediction import Searching, predict_folding
from compress.sweep.matrices import Matrix
from compress.sweep.memory import return_freed
from compress.sweep.rewriting import agree, write_rewritten
from compress.sweep.selection import check_patterns
from compress.sweep.unit import UnitRecord
from compress.sweep.walk import OUTSIDE, Walk, outcome_of, placed_skeleton

_STRAYS: Final = 0.05
"""Share of the tokens whose experts may be others behind a router with factors: where two experts are equally
good, the last bit decides. A wrong factor shows at every token."""


@dataclass(frozen=True)
class FoldPlan:
    """What will be folded.

    Attributes:
        folds: block by block.
        unfolded: layers of the blocks that stay as they are, with the reason.
    """

    folds: tuple[Fold, ...]
    unfolded: Mapping[str, str]


def check(smoother: Smoother, source: Artifact, run: Run) -> Needs:
    """Find what would be folded, refuse what cannot be, and predict the work.

    Raises:
        PlanError: nothing can be folded, a layer cannot be served, or calibration text is missing.
        UsageError: a pattern matches nothing.
    """
    if run.calibration is None:
        raise PlanError("the method needs calibration text", "give --calibration TEXT or data.calibration")
    model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
    checkpoint = Checkpoint(source, model)
    plan = plan_folding(smoother, source, model, checkpoint, run)
    readers = [(entry.block, reader) for entry in plan.folds for reader in entry.readers]
    layers = [Searching(_matrix(model, block, reader), smoother.tried) for block, reader in readers]
    return predict_folding(layers, find_blocks(model), model, checkpoint, run)


def plan_folding(
    smoother: Smoother, source: Artifact, model: Any, checkpoint: Checkpoint, run: Run
) -> FoldPlan:
    """Settle what is folded.

    Args:
        model: a skeleton of the source's model.
        checkpoint: the source's weights beside it.

    Raises:
        PlanError: nothing can be folded, or a layer cannot be served.
        UsageError: a pattern matches nothing.
    """
    found = found_in(find_folds, source, run)
    unfolded = dict(found.unfolded)
    on_disk: dict[str, list[str]] = {}
    for name in checkpoint.names:
        on_disk.setdefault(checkpoint.target[name], []).append(name)
    folds: list[Fold] = []
    for entry in found.folds:
        reason = _reason(smoother, entry, model, checkpoint, on_disk)
        if reason:
            unfolded |= {f"{entry.block}.{reader.layer}": reason for reader in entry.readers}
        else:
            folds.append(entry)
    layers = {f"{entry.block}.{reader.layer}" for entry in found.folds for reader in entry.readers}
    check_patterns({"--ignore": smoother.ignore}, model, layers | set(unfolded))
    if not folds:
        first = next(iter(sorted(unfolded.items())), ("the model", "holds no linear layer"))
        raise PlanError(f"no layer's input can be scaled: {first[0]}: {first[1]}", _remedy(smoother, found))
    for entry in folds:
        for reader in entry.readers:
            refusal = smoother.refusal(len(reader.channels))
            if refusal:
                path = f"{entry.block}.{reader.layer}"
                raise PlanError(
                    f"{path} {refusal}", f"give --fallback channel, or leave it alone with --ignore '{path}'"
                )
    return FoldPlan(tuple(folds), dict(sorted(unfolded.items())))


def _remedy(smoother: Smoother, found: Folds) -> str:
    """What to do where nothing is left to fold."""
    if smoother.into == "norms" and any(entry.kind != "norm" for entry in found.folds):
        return "let linear layers take factors with --producers all, or round without this transform"
    if smoother.ignore:
        return "loosen --ignore, or round without this transform"
    return "round without this transform"


def _reason(
    smoother: Smoother,
    entry: Fold,
    model: Any,
    checkpoint: Checkpoint,
    on_disk: Mapping[str, Sequence[str]],
) -> str:
    """Why a fold is left out; empty where it is not."""
    readers = (*entry.readers, *entry.followers)
    names = [entry.name, *(f"{entry.block}.{reader.layer}" for reader in readers)]
    if any(matches_any(smoother.ignore, name) for name in names):
        return "ignored"
    if smoother.into == "norms" and entry.kind != "norm":
        return f"{entry.name} is no norm, and norms alone were asked for"
    columns = {f"{entry.block}.{reader.parameter}": reader.dimension for reader in readers}
    for name in entry.parameters:
        files, shape = on_disk.get(name, []), tuple(model.get_parameter(name).shape)
        if len(files) == 1 and checkpoint.shape(files[0]) == shape:
            continue
        dimension = columns.get(name)
        if dimension is None or not _columns_stay(name, shape, dimension, files, checkpoint):
            return f"{name} is converted while transformers loads it"
    return ""


def _columns_stay(
    name: str, shape: tuple[int, ...], dimension: int, files: Sequence[str], checkpoint: Checkpoint
) -> bool:
    """Whether a converted parameter has its columns in the same place, from the end, in all files.

    Column numbers go through transformers' own conversion, back to how the parameter lies on disk.
    """
    sizes = [1] * len(shape)
    sizes[dimension] = shape[dimension]
    numbers = torch.arange(shape[dimension], dtype=torch.float32).view(sizes)
    found = checkpoint.to_disk({name: numbers.expand(shape)})
    if sorted(found) != sorted(files):
        return False
    return all(
        tuple(part.shape) == checkpoint.shape(file)
        and bool((part.movedim(dimension, -1) == numbers.flatten()).all())
        for file, part in found.items()
    )


def _matrix(model: Any, block: str, reader: Reader) -> Matrix:
    """A linear layer, a transposed one, or all experts of a fused parameter, as the collector wants it."""
    path = f"{block}.{reader.layer}"
    if reader.dimension is not None:
        owner, parameter = path.rpartition(".")[0], model.get_parameter(path)
        columns, kind = len(reader.channels), type(model.get_submodule(owner)).__name__
        rows, transposed = parameter.numel() // columns, reader.dimension != -1
        return Matrix(owner, path, None, kind, rows, columns, (), transposed, pooled=True)
    module = model.get_submodule(path)
    rows, columns = output_features(module), input_features(module)
    transposed = not isinstance(module, torch.nn.Linear)
    return Matrix(path, f"{path}.weight", None, type(module).__name__, rows, columns, (), transposed)


def fold(smoother: Smoother, source: Artifact, target: Path, run: Run) -> Outcome:
    """Move the factors that a smoother chooses, block by block.

    Blocks are computed in float32 on a CPU and in the model's own precision on a GPU; tensors are written in
    the precision that they have on disk.

    Raises:
        CalibrationError: no data reached a layer, or its inputs are not finite.
        VerificationError: a block with its factors does not compute what it computed.
    """
    model = placed_skeleton(source, run)
    checkpoint = Checkpoint(source, model)
    plan = plan_folding(smoother, source, model, checkpoint, run)
    walk = Walk(source, target, run, model, checkpoint, torch.device(run.device))
    outcome = _Folding(walk, smoother, plan, model.dtype).apply()
    return replace(outcome, decisions={"unfolded": dict(plan.unfolded), **outcome.decisions})


@final
@dataclass
class _Folding:
    """One walk over the blocks.

    Attributes:
        walk: the model on its way.
        smoother: chooses the factors.
        plan: where they go.
        compute: precision of the blocks.
    """

    walk: Walk
    smoother: Smoother
    plan: FoldPlan
    compute: torch.dtype
    _storage: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self._storage = loaded_dtype(self.walk.source)

    def apply(self) -> Outcome:
        """Fold every block, copy the rest, and say what was meant."""
        walk = self.walk
        walk.begin()
        activations = walk.calibration()
        if activations is None:
            raise CalibrationError("factors cannot be chosen without text", "give --calibration TEXT")
        title = f"{len(self.plan.folds)} folds in {len(walk.blocks)} blocks"
        with walk.reentry() as reentry:
            walk.load_outside()
            records = walk.through(
                title, lambda block: self._block(block, activations, reentry), self._outside
            )
        walk.complete(records, dict(walk.source.config))
        return outcome_of(records, {"folds": sum(len(record.layers) for record in records)})

    def _block(self, block: Block, activations: Activations, reentry: Reentry) -> UnitRecord:
        walk = self.walk
        event = walk.run.reporter.event
        event("block.start", block=block.name, position=block.position)
        walk.restore(block.position, activations)
        walk.checkpoint.load_module(block.name, walk.device)
        members = [entry for entry in self.plan.folds if entry.block == block.name]
        changes: dict[str, Rescaling] = {}
        layers: list[dict[str, Any]] = []
        if members:
            for entry, shared in self._stages(block, members, activations, reentry):
                event("block.calibrate", block=block.name, position=block.position)
                solved = self._solved(entry, shared, block, activations, reentry)
                layers.append(_row(entry, shared, solved))
                if bool((solved.scales != 1).any()):
                    for name, change in entry.rescalings(walk.model, solved.scales).items():
                        changes[name] = changes[name].joined(change) if name in changes else change
                for part in shared:
                    part.statistic = None
                return_freed()
        # What the proof needs is held before the recordings go on to the output of this block.
        first = activations.recordings[0].held()
        event("block.advance", block=block.name, position=block.position)
        for batch, recording in zip(activations.batches, activations.recordings, strict=True):
            reentry.advance(block.position, batch, recording)
        if changes:
            event("block.compare", block=block.name, position=block.position)
            self._compare(block, changes, activations, first, reentry)
        walk.checkpoint.release(block.name)
        record = self._write(block.position, walk.checkpoint.names_of(block.name), changes, layers)
        walk.finish(block.position, record, activations)
        return record

    def _outside(self) -> UnitRecord:
        walk = self.walk
        position = len(walk.blocks)
        walk.run.reporter.event("block.start", block=OUTSIDE, position=position)
        record = self._write(position, walk.outside_names(), {}, [])
        walk.finish(position, record, None)
        return record

    # -- factors -------------------------------------------------------------------------------------

    def _stages(
        self, block: Block, members: Sequence[Fold], activations: Activations, reentry: Reentry
    ) -> list[tuple[Fold, list[Shared]]]:
        """The folds in the order in which the block reads them, each with its readers by their input."""
        readers = [(entry.block, reader) for entry in members for reader in entry.readers]
        matrices = [_matrix(self.walk.model, *entry) for entry in readers]
        collector = Collector(self.walk.model, matrices)
        found = collector.discover(
            lambda: reentry.run(block.position, activations.batches[0], activations.recordings[0])
        )
        owner = {f"{entry.block}.{reader.layer}": entry for entry in members for reader in entry.readers}
        stages: dict[str, tuple[Fold, list[Shared]]] = {}
        for shared in (part for stage in found for part in stage):
            # Layers of two folds never see one tensor: each fold would change it for the other.
            entry = owner[shared.matrices[0].name]
            stages.setdefault(entry.producer, (entry, []))[1].append(shared)
        return list(stages.values())

    def _solved(
        self,
        entry: Fold,
        stage: Sequence[Shared],
        block: Block,
        activations: Activations,
        reentry: Reentry,
    ) -> Solved:
        """The factors of one fold, from one pass over the text up to its last reader."""
        walk = self.walk
        walk.run.reporter.event("layer.solve", layer=entry.name)
        matrices = [matrix for shared in stage for matrix in shared.matrices]
        collector = Collector(walk.model, matrices)
        with collector.gather(stage, lambda columns: self.smoother.statistic(columns, walk.device)) as begin:
            for batch, recording in zip(activations.batches, activations.recordings, strict=True):
                begin()
                try:
                    reentry.run(block.position, batch, recording)
                except Enough:
                    continue
        channels = {f"{entry.block}.{reader.layer}": reader.channels for reader in entry.readers}
        try:
            with torch.no_grad():
                readings = [self._reading(shared, channels) for shared in stage]
                solved = self.smoother.solve(readings, len(entry.rows), self._storage)
        except CalibrationError as error:
            raise CalibrationError(f"{entry.name}: {error.message}", error.hint) from error
        if not bool((torch.isfinite(solved.scales) & (solved.scales > 0)).all()):
            raise CalibrationError(
                f"{entry.name}: a factor is not a positive number",
                "check that the model is sound in this dtype: does it give finite losses on the text?",
            )
        return solved

    def _reading(self, shared: Shared, channels: Mapping[str, torch.Tensor]) -> Reading:
        model = self.walk.model
        weights = [matrix.of(model.get_parameter(matrix.parameter)).float() for matrix in shared.matrices]
        if shared.statistic is None:
            raise CalibrationError("nothing was gathered", "give calibration text")
        return Reading(torch.cat(weights), shared.statistic, channels[shared.matrices[0].name])

    # -- proof and writing -----------------------------------------------------------------------------

    def _compare(
        self,
        block: Block,
        changes: Mapping[str, Rescaling],
        activations: Activations,
        first: Recording,
        reentry: Reentry,
    ) -> None:
        """Hold the block with its factors against the block as it was, on one batch."""
        with torch.no_grad():
            for name, change in changes.items():
                parameter = self.walk.model.get_parameter(name)
                parameter.copy_(change.of(parameter))
        after = hidden_state(reentry.run(block.position, activations.batches[0], first))
        routed = any(entry.followers for entry in self.plan.folds if entry.block == block.name)
        before = activations.recordings[0].hidden[block.stack]
        same, words = agree(before, after, self.compute, _STRAYS if routed else 0.0)
        if not same:
            raise VerificationError(
                f"{block.name} with its factors moved is {words}",
                "something in it depends on the input in a way that was not seen: report this architecture; "
                "--producers norms may leave out what does it",
            )

    def _write(
        self,
        position: int,
        names: Sequence[str],
        changes: Mapping[str, Rescaling],
        layers: list[dict[str, Any]],
    ) -> UnitRecord:
        """Write one shard: changed tensors changed, all others byte for byte."""

        def rewrite(parameter: str, tensor: torch.Tensor) -> torch.Tensor | None:
            change = changes.get(parameter)
            return None if change is None else change.of(tensor)

        return write_rewritten(self.walk, position, names, rewrite, layers)


def _row(entry: Fold, stage: Sequence[Shared], solved: Solved) -> dict[str, Any]:
    """What the table of layers says of one fold."""
    matrices = [matrix for shared in stage for matrix in shared.matrices]
    notes = {"largest": float(solved.scales.amax()), "smallest": float(solved.scales.amin()), **solved.notes}
    return {
        "layer": entry.name,
        "kind": entry.kind,
        "readers": " ".join(reader.layer for reader in (*entry.readers, *entry.followers)),
        "rows": sum(matrix.rows for matrix in matrices),
        "columns": len(entry.rows),
        "tokens": min(shared.statistic.tokens if shared.statistic else 0 for shared in stage),
        **{key: f"{value:.6g}" if isinstance(value, float) else value for key, value in notes.items()},
    }
