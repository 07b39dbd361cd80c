"""How little each block does to the hidden state, in one pass over the text, from disk to memory.

One block after the other is brought from disk, the calibration batches run through it, and what goes in is
compared with what comes out. Some positions of every place between blocks are kept, so that runs of
neighbours can be compared as well: the last of each sequence, as in the paper, and as many before it as fit.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, final

import torch
from safetensors import safe_open
from torch import nn

from compress.core.errors import CalibrationError, PlanError
from compress.core.run import RESUMABLE
from compress.formats.shards import write_shard
from compress.models.blocks import Block, Recording, Reentry
from compress.numerics.similarity import Influence, angular_distance
from compress.sweep.activations import Activations
from compress.sweep.depth_choice import Judgement, best_windows, dispensable, windows
from compress.sweep.depth_plan import DepthPlan
from compress.sweep.memory import return_freed
from compress.sweep.unit import UnitRecord
from compress.sweep.walk import Walk

_FOLDER: Final = "scan"
_COMPARED: Final = 1 << 28
"""Bytes of hidden states, over all places between blocks, that are kept to compare windows by."""
_ENTERING: Final = "entering"
_LEAVING: Final = "leaving"


@dataclass
class Arrived:
    """What a block was given.

    Attributes:
        hidden: on the CPU, in memory of its own: a block may add to what it was given in place.
    """

    hidden: torch.Tensor = field(default_factory=lambda: torch.zeros(0))


def given_to(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The hidden state among what a block is called with: the first of it."""
    given: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
    return given


@contextmanager
def arriving(module: nn.Module) -> Iterator[Arrived]:
    """The hidden state with which a block is called while the context lasts."""
    arrived = Arrived()

    def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arrived.hidden = given_to(args, kwargs).detach().to("cpu", copy=True)

    hook = module.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        yield arrived
    finally:
        hook.remove()


def judge_by_influence(walk: Walk, plan: DepthPlan) -> Judgement:
    """Measure all blocks and choose those that go.

    Finished blocks are kept below ``run.scratch`` and not measured again.

    Args:
        walk: the model before the cut; its blocks are let go again.
        plan: how many go, and whether they must be neighbours.

    Raises:
        CalibrationError: a hidden state is not finite.
        PlanError: the run has no calibration text, or there is no configuration for any selection.
    """
    scan = _Scan(walk)
    rows = scan.all()
    blocks = {number: float(row["influence"]) for number, row in enumerate(rows)}
    tokens = int(rows[0]["tokens"])
    if not plan.contiguous:
        return Judgement(dispensable(blocks, plan), "influence", blocks, {}, tokens)
    distances = scan.distances(plan)
    return Judgement(best_windows(distances, plan), "influence", blocks, distances, tokens)


@final
class _Scan:
    """One pass over the blocks of a model."""

    def __init__(self, walk: Walk) -> None:
        folder = walk.run.scratch / _FOLDER
        self._marker = walk.run.scratch / RESUMABLE
        # Its progress is apart from that of the cut, which counts other units.
        run = replace(walk.run, scratch=folder)
        self._walk = Walk(walk.source, folder, run, walk.model, walk.checkpoint, walk.device)

    def all(self) -> list[dict[str, Any]]:
        """A row for each block, in order: its influence and the tokens that it was measured on."""
        walk = self._walk
        activations = walk.calibration()
        if activations is None:
            raise PlanError("blocks are judged by calibration text", "give --calibration TEXT")
        walk.begin()
        walk.load_outside()
        rows: list[dict[str, Any]] = []
        title = f"influence of {len(walk.blocks)} blocks"
        with (
            walk.reentry() as reentry,
            walk.run.reporter.progress(title, len(walk.blocks), "block") as advance,
        ):
            for block in walk.blocks:
                record = walk.finished(block.name, block.position)
                if record is None:
                    record = self._block(block, activations, reentry)
                rows += record.layers
                return_freed()
                advance(1)
        return rows

    def distances(self, plan: DepthPlan) -> dict[int, float]:
        """The angular distance over each run of neighbours that may go, by the first of them."""
        return {
            gone[0]: angular_distance(self._entering(gone[0]), self._leaving(gone[-1]))
            for gone in windows(plan)
        }

    def _block(self, block: Block, activations: Activations, reentry: Reentry) -> UnitRecord:
        walk = self._walk
        walk.run.reporter.event("block.start", block=block.name, position=block.position)
        walk.restore(block.position, activations)
        walk.checkpoint.load_module(block.name, walk.device)
        walk.run.reporter.event("block.calibrate", block=block.name, position=block.position)
        influence = Influence()
        kept: dict[str, list[torch.Tensor]] = {_ENTERING: [], _LEAVING: []}
        for batch, recording in zip(activations.batches, activations.recordings, strict=True):
            with arriving(block.module) as arrived:
                reentry.advance(block.position, batch, recording)
            leaving = recording.hidden[block.stack]
            influence.add(arrived.hidden, leaving)
            places = _places(leaving, len(activations.batches), len(walk.blocks))
            kept[_ENTERING].append(arrived.hidden[:, places].flatten(0, -2))
            kept[_LEAVING].append(leaving[:, places].flatten(0, -2))
        walk.checkpoint.release(block.name)
        try:
            value = influence.value
        except CalibrationError as error:
            raise CalibrationError(f"{block.name}: {error.message}", error.hint) from error
        row = {"block": block.name, "tokens": influence.tokens, "influence": value}
        record = self._write(block, {name: torch.cat(parts) for name, parts in kept.items()}, row)
        last = block.position == len(walk.blocks) - 1
        walk.finish(block.position, record, None if last else activations)
        self._marker.touch()
        return record

    def _write(self, block: Block, states: dict[str, torch.Tensor], row: dict[str, Any]) -> UnitRecord:
        if not self._begins(block.position):
            # What enters a block is what left the one before.
            del states[_ENTERING]
        file = _file(block.position)
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in states.items()}
        size = write_shard(self._walk.target / file, layout, states.__getitem__, lambda _: None)
        return UnitRecord(file, sorted(layout), size, {}, [row])

    def _begins(self, position: int) -> bool:
        """Whether a block is the first of its stack."""
        blocks = self._walk.blocks
        return position == 0 or blocks[position - 1].stack != blocks[position].stack

    def _entering(self, position: int) -> torch.Tensor:
        """Hidden states at some positions in front of a block, ``[positions, width]``."""
        if self._begins(position):
            return self._states(position, _ENTERING)
        return self._leaving(position - 1)

    def _leaving(self, position: int) -> torch.Tensor:
        """Hidden states at the same positions behind a block."""
        return self._states(position, _LEAVING)

    def _states(self, position: int, name: str) -> torch.Tensor:
        with safe_open(self._walk.target / _file(position), framework="pt") as handle:
            states: torch.Tensor = handle.get_tensor(name)
        return states


def _file(position: int) -> str:
    return f"states-{position:05d}.safetensors"


def _places(hidden: torch.Tensor, batches: int, blocks: int) -> torch.Tensor:
    """Positions of a sequence that are kept: the last one, and others at even distances before it."""
    sequences, length, width = hidden.shape
    room = _COMPARED // ((blocks + 1) * batches * sequences * width * hidden.element_size())
    stride = -(-length // max(1, min(room, length)))
    return torch.arange(length - 1, -1, -stride).flip(0)


def passed(reentry: Reentry, block: Block, batch: Mapping[str, torch.Tensor], recording: Recording) -> None:
    """Go past a block that is left out: what it was given goes on, in the shape in which it returns it."""
    with arriving(block.module) as arrived:
        reentry.advance(block.position, batch, recording)
    recording.hidden[block.stack] = arrived.hidden
