"""What counts for channels and heads, before anything is cut.

By *activation* a channel counts by the mean magnitude of what it carries over a sequence, in the root of the
sum of squares over sequences (Muralidharan et al. 2024, "Minitron", arXiv 2407.14679, section 2.2); those of
the residual stream behind every norm, summed over the norms. By *magnitude* it counts by the norm of its
weights. By *taylor* it counts by what the loss changes without it to first order
(`compress.sweep.first_terms`), again summed over the norms.

The first runs the model block by block, the second only reads weights, the third needs the whole model and a
way back through it in memory.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, final

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from compress.core.artifact import Artifact
from compress.core.errors import CalibrationError, PlanError
from compress.core.run import RESUMABLE, Run
from compress.formats.shards import write_shard
from compress.models.blocks import Block, Reentry
from compress.models.channels import Channels
from compress.models.probe import input_dimension, output_dimension
from compress.models.tasks import TextGeneration, resolve
from compress.numerics.masks import PartImportance
from compress.sweep.activations import Activations
from compress.sweep.first_terms import first_terms
from compress.sweep.narrow_plan import NarrowPlan
from compress.sweep.unit import UnitRecord
from compress.sweep.walk import OUTSIDE, Walk

By = Literal["activation", "taylor", "magnitude"]
_FOLDER: Final = "importance"
_STREAM: Final = "residual stream"


@dataclass(frozen=True)
class Importance:
    """How much parts count.

    Attributes:
        parts: float64 ``[parts]`` by the layer that reads them; a layer that is not here is judged by what it
            reads while the model is cut.
        hidden: float64 ``[channels]`` of the residual stream; ``None`` where they stay.
    """

    parts: Mapping[str, torch.Tensor]
    hidden: torch.Tensor | None


def check_importance(by: By, source: Artifact, run: Run) -> None:
    """Refuse what a model cannot be judged by.

    Raises:
        PlanError: gradients are asked for, and the task has no loss of its own.
    """
    task = resolve(run.task, source.config)
    if by == "taylor" and not isinstance(task, TextGeneration):
        raise PlanError(
            f"importance by taylor needs a loss on plain text, and a model for {task.name} has none",
            "use --importance activation or magnitude",
        )


def judge(walk: Walk, plan: NarrowPlan, by: By) -> Importance:
    """Measure what has to be known before the cut.

    What is measured is kept below ``run.scratch`` and not measured again.

    Args:
        walk: the wide model; its weights are let go again.

    Raises:
        CalibrationError: activations or gradients are not finite.
    """
    if by == "activation" and plan.hidden is None:
        return Importance({}, None)
    folder = walk.run.scratch / _FOLDER
    # Its progress is apart from that of the cut.
    run = replace(walk.run, scratch=folder)
    own = Walk(walk.source, folder, run, walk.model, walk.checkpoint, walk.device)
    own.begin()
    (walk.run.scratch / RESUMABLE).touch()
    found = _first_order(own, plan) if by == "taylor" else _Streamed(own, plan, by).all()
    hidden = found.pop(_STREAM, None)
    return Importance({} if by == "activation" else found, hidden)


@final
class _Streamed:
    """One pass over the blocks, from disk."""

    def __init__(self, walk: Walk, plan: NarrowPlan, by: By) -> None:
        self._walk, self._plan, self._by = walk, plan, by

    def all(self) -> dict[str, torch.Tensor]:
        """What was measured, by reader, and that of the stream."""
        walk = self._walk
        activations = walk.calibration() if self._by == "activation" else None
        with walk.reentry() as reentry:
            if activations is not None:
                walk.load_outside()
            records = walk.through(
                f"{self._by} of {len(walk.blocks)} blocks",
                lambda block: self._block(block, activations, reentry),
                self._outside,
            )
        found: dict[str, torch.Tensor] = {}
        for record in records:
            with safe_open(walk.target / record.file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                    values = handle.get_tensor(name).clone()
                    found[name] = values + found[name] if name in found else values
        if self._by == "magnitude":
            # Of weights the squares were summed.
            found = {name: values.sqrt() for name, values in found.items()}
        (walk.run.scratch / f"activations-{len(walk.blocks) - 1:05d}.safetensors").unlink(missing_ok=True)
        return found

    def _block(self, block: Block, activations: Activations | None, reentry: Reentry) -> UnitRecord:
        walk = self._walk
        walk.run.reporter.event("block.start", block=block.name, position=block.position)
        walk.restore(block.position, activations)
        walk.checkpoint.load_module(block.name, walk.device)
        if activations is None:
            found = self._magnitudes(block)
        else:
            found = {_STREAM: self._activation(block, activations, reentry)}
        walk.checkpoint.release(block.name)
        return self._keep(block.position, found, activations)

    def _outside(self) -> UnitRecord:
        walk, hidden = self._walk, self._plan.hidden
        walk.run.reporter.event("block.start", block=OUTSIDE, position=len(walk.blocks))
        found = {}
        if self._by == "magnitude" and hidden is not None:
            found[_STREAM] = self._stream_squares(walk.outside_names(), walk.checkpoint.tensor)
        return self._keep(len(walk.blocks), found, None)

    def _keep(
        self, position: int, found: dict[str, torch.Tensor], activations: Activations | None
    ) -> UnitRecord:
        file = f"importance-{position:05d}.safetensors"
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}
        size = write_shard(self._walk.target / file, layout, found.__getitem__, lambda _: None)
        record = UnitRecord(file, sorted(layout), size, {}, [])
        self._walk.finish(position, record, activations)
        return record

    def _activation(self, block: Block, activations: Activations, reentry: Reentry) -> torch.Tensor:
        """Of the channels of the stream behind the norms of one block, summed over these."""
        hidden = self._plan.hidden
        if hidden is None:
            raise ValueError("the residual stream is not cut")
        width = hidden.residual.width
        norms = [name for name in sorted(hidden.residual.norms) if name.startswith(f"{block.name}.")]
        gathered = [PartImportance(torch.arange(width).unsqueeze(1), self._walk.device) for _ in norms]
        handles = [
            self._walk.model.get_submodule(name).register_forward_hook(_taking(importance))
            for name, importance in zip(norms, gathered, strict=True)
        ]
        try:
            for batch, recording in zip(activations.batches, activations.recordings, strict=True):
                reentry.advance(block.position, batch, recording)
        finally:
            for handle in handles:
                handle.remove()
        total = torch.zeros(width, dtype=torch.float64)
        for name, importance in zip(norms, gathered, strict=True):
            with _named(name):
                total += importance.importance
        return total

    def _magnitudes(self, block: Block) -> dict[str, torch.Tensor]:
        """Squares of the weights of every part in one block, and of the channels of the stream there."""
        walk = self._walk
        members = [entry for entry in self._plan.channels if entry.reader.startswith(f"{block.name}.")]
        found = {entry.reader: part_squares(walk.model, entry) for entry in members}
        if self._plan.hidden is not None:
            names = walk.checkpoint.names_of(block.name)
            found[_STREAM] = self._stream_squares(names, walk.checkpoint.tensor)
        return found

    def _stream_squares(self, names: list[str], tensor: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Squares of all weights of every channel among some tensors on disk."""
        hidden = self._plan.hidden
        if hidden is None:
            raise ValueError("the residual stream is not cut")
        cuts = hidden.cuts(self._walk.model, torch.zeros(0, dtype=torch.int64))
        total = torch.zeros(hidden.residual.width, dtype=torch.float64)
        for name in names:
            cut = cuts.get(self._walk.checkpoint.target[name])
            if cut is not None:
                squares = tensor(name).float().square()
                for dimension in cut.places:
                    others = [place for place in range(squares.dim()) if place != dimension]
                    total += squares.sum(others, dtype=torch.float64) if others else squares.double()
        return total


def part_squares(model: Any, entry: Channels) -> torch.Tensor:
    """The sum of squares of all weights of each part in front of a layer, float64 ``[parts]``.

    What parts of a group share counts for each of them.

    Args:
        model: with the block's weights in memory.
    """
    reader = model.get_submodule(entry.reader)
    columns = reader.weight.detach().float().square().sum(1 - input_dimension(reader), dtype=torch.float64)
    rows: dict[str, torch.Tensor] = {}
    for producer in entry.producers:
        module = model.get_submodule(f"{entry.block}.{producer}")
        dimension = output_dimension(module, "weight") or 0
        rows[producer] = module.weight.detach().float().square().sum(1 - dimension, dtype=torch.float64)
    found = []
    for group in entry.groups:
        shared = sum(float(rows[name][list(own)].sum()) for name, own in group.shared.items())
        for part in group.parts:
            own_rows = sum(float(rows[name][list(own)].sum()) for name, own in part.rows.items())
            found.append(float(columns[list(part.columns)].sum()) + own_rows + shared)
    return torch.tensor(found, dtype=torch.float64)


def _taking(importance: PartImportance) -> Any:
    def hook(_: object, __: object, output: torch.Tensor) -> None:
        for sequence in output.detach().reshape(-1, *output.shape[-2:]):
            importance.add(sequence)

    return hook


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say where a sum was not finite."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(f"{name}: {error.message}", error.hint) from error


def _first_order(walk: Walk, plan: NarrowPlan) -> dict[str, torch.Tensor]:
    """What the loss changes to first order, by reader, and that of the stream behind all norms."""
    file = walk.target / "taylor.safetensors"
    if not file.is_file():
        read = {
            entry.reader: torch.tensor([part.columns for group in entry.groups for part in group.parts])
            for entry in plan.channels
        }
        norms = sorted(plan.hidden.residual.norms) if plan.hidden is not None else []
        found = first_terms(walk, read, norms)
        behind = [found.pop(norm) for norm in norms if norm in found]
        if behind:
            found[_STREAM] = torch.stack(behind).sum(0)
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}
        write_shard(file, layout, found.__getitem__, lambda _: None)
    return load_file(file)
