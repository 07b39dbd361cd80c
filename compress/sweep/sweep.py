"""The streaming sweep: one block in memory at a time, whatever the depth of the model.

For each block: bring it from disk, let the calibration batches run through it while statistics gather,
treat its matrices stage by stage (a stage is what shares an input) and, where the treatment asks for it,
all of them together; run the batches again so that the next block sees the treated one, write its shard,
free it. Every finished block is a point to resume from.
"""

import math
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.core.artifact import Artifact
from compress.core.errors import CalibrationError
from compress.core.passes import Outcome
from compress.core.run import Run
from compress.formats.shards import shard_name
from compress.models.blocks import Block, Recording
from compress.models.checkpoint import Checkpoint
from compress.numerics.grouping import HOST_ROWS, row_chunks
from compress.sweep.activations import Activations
from compress.sweep.collector import Collector, Enough, Shared
from compress.sweep.joint import JointTreatment, SweptBlock
from compress.sweep.matrices import Matrix
from compress.sweep.memory import return_freed
from compress.sweep.scarcity import scarce, warning
from compress.sweep.treatment import Replacement, Treated, Treatment
from compress.sweep.unit import UnitRecord, encode, write_unit
from compress.sweep.walk import OUTSIDE, Walk, decided

Labels = Mapping[Matrix, Hashable]


@dataclass
class _Progress:
    """The matrices of one unit while it is being treated."""

    results: dict[Matrix, Replacement] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    rows: dict[Matrix, dict[str, Any]] = field(default_factory=dict)
    """Of the table of layers."""
    seconds: dict[Matrix, float] = field(default_factory=dict)

    def layers(self) -> list[dict[str, Any]]:
        """The rows of the table, complete."""
        return [{**row, "seconds": f"{self.seconds[matrix]:.4f}"} for matrix, row in self.rows.items()]


@dataclass
class Sweep:
    """One treatment of one model, from disk to disk.

    Attributes:
        treatment: what is done to the matrices.
        source: the artifact that is read.
        target: the folder that is written; it may hold earlier progress.
        run: the circumstances.
        model: a skeleton of the source's model.
        checkpoint: the source's weights beside the skeleton.
        labels: the matrices to treat, in the order of the model, and how.
        device: where blocks are computed.
    """

    treatment: Treatment
    source: Artifact
    target: Path
    run: Run
    model: Any
    checkpoint: Checkpoint
    labels: Labels
    device: torch.device

    def __post_init__(self) -> None:
        self._walk = Walk(self.source, self.target, self.run, self.model, self.checkpoint, self.device)
        self.blocks = self._walk.blocks

    def apply(self) -> Outcome:
        """Treat every matrix, write every shard, and say what was meant.

        Raises:
            CalibrationError: no data reached a matrix, or fewer were treated than were planned.
        """
        self._walk.begin()
        treatment = self.treatment
        activations = self._walk.calibration(original=treatment.original) if treatment.calibrated else None
        title = f"{len(self.labels)} matrices in {len(self.blocks)} blocks"
        with self._walk.reentry() as self._reentry:
            if treatment.calibrated or self._labels_outside():
                self._walk.load_outside()
            records = self._walk.through(
                title, lambda block: self._block(block, activations), lambda: self._outside(activations)
            )
        return self._complete(records)

    # -- one unit ------------------------------------------------------------------------------------

    def _block(self, block: Block, activations: Activations | None) -> UnitRecord:
        event = self.run.reporter.event
        event("block.start", block=block.name, position=block.position)
        self._walk.restore(block.position, activations)
        self.checkpoint.load_module(block.name, self.device)
        matrices = self._labels_in(block)
        progress = _Progress()
        if activations is None:
            self._treat([Shared([matrix]) for matrix in matrices], matrices, progress)
        else:
            if activations.original:
                # While the block is still the original one: what it says is also what it will be held to.
                self._advance(block.position, activations.batches, activations.original)
            self._calibrated(block, matrices, activations, progress)
            event("block.advance", block=block.name, position=block.position)
            self._advance(block.position, activations.batches, activations.recordings)
        # What was rounded is written from its integers: the block's floats have done their work.
        self.checkpoint.release(block.name)
        return self._finish(block.position, self.checkpoint.names_of(block.name), progress, activations)

    def _calibrated(
        self, block: Block, matrices: Labels, activations: Activations, progress: _Progress
    ) -> None:
        """Treat the matrices of a block stage by stage, and then together where that is asked for."""
        if not matrices:
            return
        collector = Collector(self.model, list(matrices))
        first = lambda: self._reentry.run(  # noqa: E731 - one expression, used once
            block.position, activations.batches[0], activations.recordings[0]
        )
        for stage in self._stages(collector.discover(first)):
            self.run.reporter.event("block.calibrate", block=block.name, position=block.position)
            with collector.gather(stage, self._statistic) as begin:
                self._pass(block.position, activations, begin)
            self._treat(stage, matrices, progress)
        if (joint := self.treatment.joint) is not None:
            self._treat_jointly(joint, block, matrices, activations, progress)

    def _outside(self, activations: Activations | None) -> UnitRecord:
        """Everything outside the blocks: copied, but for the matrices that were asked for."""
        position = len(self.blocks)
        self.run.reporter.event("block.start", block=OUTSIDE, position=position)
        matrices = self._labels_outside()
        progress = _Progress()
        if matrices:
            self._walk.restore(position, activations)
            self._walk.load_head()
            self._free_tied(matrices)
            seen = [matrix for matrix in matrices if matrix.kind != "Embedding"]
            if activations is not None and seen:
                collector = Collector(self.model, seen)
                stage = [Shared([matrix]) for matrix in seen]
                with collector.gather(stage, self._statistic) as begin:
                    self._pass(position, activations, begin)
                self._treat(stage, matrices, progress)
            else:
                self._treat([Shared([matrix]) for matrix in seen], matrices, progress)
            # A row of an embedding is looked up, not multiplied: there is no input to calibrate on.
            lookups = [Shared([matrix]) for matrix in matrices if matrix.kind == "Embedding"]
            self._treat(lookups, matrices, progress)
        return self._finish(position, self._walk.outside_names(), progress, None)

    def _stages(self, found: list[list[Shared]]) -> list[list[Shared]]:
        """Stages as they are gathered: one after the other, or all from the block as it was."""
        if self.treatment.staged or not found:
            return found
        return [[shared for stage in found for shared in stage]]

    def _advance(self, position: int, batches: Sequence[Any], recordings: Sequence[Recording]) -> None:
        for batch, recording in zip(batches, recordings, strict=True):
            self._reentry.advance(position, batch, recording)

    def _pass(self, position: int, activations: Activations, begin: Any) -> None:
        for batch, recording in zip(activations.batches, activations.recordings, strict=True):
            begin()
            try:
                self._reentry.run(position, batch, recording)
            except Enough:
                continue

    def _statistic(self, columns: int) -> Any:
        return self.treatment.statistic(columns, self.device)

    def _treat(self, stage: Sequence[Shared], labels: Labels, progress: _Progress) -> None:
        for shared in stage:
            for label in dict.fromkeys(labels[matrix] for matrix in shared.matrices):
                alike = [matrix for matrix in shared.matrices if labels[matrix] == label]
                for together in self._stacks(alike):
                    self._treat_together(together, shared, label, progress)
                    return_freed()
            shared.statistic = None
            return_freed()

    def _stacks(self, matrices: Sequence[Matrix]) -> Iterator[list[Matrix]]:
        """Matrices that are treated in one call: all on an accelerator, on a CPU as many as it works on.

        A call walks over the columns once for all its rows. A CPU does so `HOST_ROWS` at a time, and more
        in a call would only stand in memory.
        """
        stack: list[Matrix] = []
        for matrix in matrices:
            rows = sum(entry.rows for entry in stack) + matrix.rows
            if stack and self.device.type == "cpu" and rows > HOST_ROWS:
                yield stack
                stack = []
            stack.append(matrix)
        yield stack

    def _treat_together(
        self, matrices: list[Matrix], shared: Shared, label: Hashable, progress: _Progress
    ) -> None:
        """Round matrices that share an input and a scheme in one call, and put them into the model."""
        for matrix in matrices:
            self.run.reporter.event("layer.solve", layer=matrix.name)
        statistic = shared.statistic
        tokens = statistic.tokens if statistic is not None else 0
        if statistic is not None and tokens == 0:
            raise CalibrationError(
                f"no calibration data reached {matrices[0].name}",
                "give more --samples or more varied text, or leave it in floats with --ignore",
            )
        started = time.perf_counter()
        with torch.no_grad():
            views = [matrix.of(self.model.get_parameter(matrix.parameter)) for matrix in matrices]
            stacked = torch.cat([view.float() for view in views])
            treated = self.treatment.treat(stacked, statistic, label)
            del stacked
            seconds = (time.perf_counter() - started) / len(matrices)
            start = 0
            for matrix in matrices:
                part = treated.replacement.rows(start, start + matrix.rows)
                start += matrix.rows
                row = {"layer": matrix.name, "rows": matrix.rows, "columns": matrix.columns}
                if matrix.kind != "Embedding":
                    row["tokens"] = tokens
                progress.rows[matrix] = row | {"scheme": str(label)}
                progress.seconds[matrix] = seconds
                self._put(matrix, Treated(part, treated.notes), progress)

    def _treat_jointly(
        self,
        joint: JointTreatment,
        block: Block,
        matrices: Labels,
        activations: Activations,
        progress: _Progress,
    ) -> None:
        """Treat all matrices of a block at once, beginning with what each got alone."""
        self.run.reporter.event("block.joint", block=block.name, position=block.position)
        started = time.perf_counter()
        self._reload(block)
        problem = SweptBlock(block, matrices, self.model, self._reentry, activations, self.run)
        treated = joint.treat(dict(progress.results), matrices, problem)
        del problem
        # Once more, so that the errors are those against the weights of the source.
        self._reload(block)
        seconds = (time.perf_counter() - started) / len(matrices)
        for matrix, entry in treated.items():
            progress.seconds[matrix] += seconds
            with torch.no_grad():
                self._put(matrix, entry, progress)
        return_freed()

    def _reload(self, block: Block) -> None:
        """Bring the weights of the source back into a block."""
        self.checkpoint.release(block.name)
        self.checkpoint.load_module(block.name, self.device)

    def _put(self, matrix: Matrix, treated: Treated, progress: _Progress) -> None:
        """Put a replacement into the model, in the place of the weights of the source, and record it."""
        error = _replace(matrix.of(self.model.get_parameter(matrix.parameter)), treated.replacement)
        progress.results[matrix] = treated.replacement
        progress.errors[matrix.name] = error
        notes = {**treated.notes, **treated.replacement.notes()}
        progress.rows[matrix] |= {"error": f"{error:.6g}", **_recorded(notes)}

    # -- the edges ---------------------------------------------------------------------------------

    def _labels_in(self, block: Block) -> Labels:
        inside = f"{block.name}."
        return {matrix: label for matrix, label in self.labels.items() if matrix.parameter.startswith(inside)}

    def _labels_outside(self) -> Labels:
        inside = tuple(f"{block.name}." for block in self.blocks)
        return {m: label for m, label in self.labels.items() if not m.parameter.startswith(inside)}

    def _free_tied(self, matrices: Labels) -> None:
        """Give a head that shares the embedding's weight a copy of its own before either is rounded."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if head is not None and head.weight is embedding.weight and self._unties(matrices):
            head.weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)

    def _unties(self, matrices: Labels) -> bool:
        head = self.model.get_output_embeddings()
        return any(self.model.get_submodule(matrix.module) is head for matrix in matrices)

    # -- records -----------------------------------------------------------------------------------

    def _finish(
        self, position: int, names: list[str], progress: _Progress, activations: Activations | None
    ) -> UnitRecord:
        encoded = encode(progress.results, progress.errors, self.labels, self.treatment, self.checkpoint)
        file = shard_name(position, len(self.blocks) + 1)
        record = write_unit(self.target, file, names, encoded, progress.layers(), self.checkpoint, self.run)
        self._walk.finish(position, record, activations)
        return record

    def _complete(self, records: list[UnitRecord]) -> Outcome:
        tensors = {name: meant for record in records for name, meant in record.tensors.items()}
        config = self.treatment.configuration()
        if self._unties(self._labels_outside()):
            config["tie_word_embeddings"] = False
        self._walk.complete(records, config)
        layers = [row for record in records for row in record.layers]
        treated = [row["layer"] for row in layers]
        planned = [matrix.name for matrix in self.labels]
        if sorted(treated) != sorted(planned):
            lost = sorted(set(planned) ^ set(treated))
            raise CalibrationError(
                f"{len(planned)} matrices were planned and {len(treated)} treated, first: {lost[0]}"
            )
        decisions: dict[str, Any] = {
            "matrices": len(layers),
            "changed": sum(meant.changed for meant in tensors.values()),
        }
        if few := scarce(layers):
            self.run.reporter.message(warning(few, len(layers)))
            decisions["scarce"] = few
        return Outcome({**decisions, "layers": decided(layers)}, tensors)


def _replace(weight: torch.Tensor, replacement: Replacement) -> float:
    """Overwrite a weight with its replacement, some rows at a time; the error relative to its norm."""
    lost, total = 0.0, 0.0
    for rows in row_chunks(weight):
        old = weight[rows]
        new = replacement.rows(rows.start, rows.stop).value().to(old.dtype)
        lost += float((old - new).square_().sum(dtype=torch.float64))
        total += float(old.square().sum(dtype=torch.float64))
        old.copy_(new)
    return math.sqrt(lost / total) if total > 0 else math.sqrt(lost)


def _recorded(notes: Mapping[str, Any]) -> dict[str, str]:
    """Notes as they appear in the table of layers: short, and the same on every machine."""
    return {key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in notes.items()}
