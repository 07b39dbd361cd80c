"""What the layers of a model read of the residual stream, and the basis that holds most of it.

The calibration batches run through the model as it is, block after block from disk. In front of every norm,
and of whatever reads the stream without one, each token is brought to unit length and its second moments are
summed up, one sum for all places: one rotation serves the whole stream, because an ordinary model adds the
hidden state to what a block computes without a matrix between them. (The paper has such a matrix in every
block, which turns the basis of one layer into that of the next, and which no ordinary class has.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, final

import torch
from safetensors import safe_open
from torch import nn

from compress.core.errors import CalibrationError, PlanError
from compress.core.run import RESUMABLE
from compress.formats.shards import write_shard
from compress.models.blocks import Block, Reentry
from compress.numerics.hessian import Hessian
from compress.numerics.principal import Basis, principal
from compress.numerics.statistic import check_sums
from compress.sweep.activations import Activations
from compress.sweep.memory import return_freed
from compress.sweep.slice_plan import SlicePlan
from compress.sweep.unit import UnitRecord
from compress.sweep.walk import Walk

_FOLDER: Final = "principal"
_SUM: Final = "moments"


def find_basis(walk: Walk, plan: SlicePlan) -> Basis:
    """The basis in which a model's stream is kept.

    Finished blocks are kept below ``run.scratch`` and not run again.

    Args:
        walk: the wide model; its blocks are let go again.

    Raises:
        CalibrationError: a hidden state is not finite.
        PlanError: the run has no calibration text.
    """
    moments = _Scan(walk, plan).moments()
    return principal(moments.to(walk.device), plan.kept, without_mean=plan.stream.keeps_mean)


@final
class _Scan:
    """One pass over the blocks of a model."""

    def __init__(self, walk: Walk, plan: SlicePlan) -> None:
        folder = walk.run.scratch / _FOLDER
        self._marker = walk.run.scratch / RESUMABLE
        # Its progress is apart from that of the writing, which counts the same units.
        run = replace(walk.run, scratch=folder)
        self._walk = Walk(walk.source, folder, run, walk.model, walk.checkpoint, walk.device)
        self._plan = plan
        self._sum = torch.zeros(plan.stream.width, plan.stream.width, dtype=torch.float64)

    def moments(self) -> torch.Tensor:
        """The sum over all places, float64 ``[width, width]``."""
        walk = self._walk
        activations = walk.calibration()
        if activations is None:
            raise PlanError("principal components are those of calibration text", "give --calibration TEXT")
        walk.begin()
        done = self._take_up()
        title = f"principal components over {len(walk.blocks)} blocks"
        with (
            walk.reentry() as reentry,
            walk.run.reporter.progress(title, len(walk.blocks), "block") as advance,
        ):
            if done < len(walk.blocks):
                walk.load_outside()
            advance(done)
            for block in walk.blocks[done:]:
                self._block(block, activations, reentry)
                return_freed()
                advance(1)
        return self._sum

    def _take_up(self) -> int:
        """How many blocks an earlier run finished; the sum over them is taken up."""
        for block in reversed(self._walk.blocks):
            # Only the last one still has its sum.
            if self._walk.finished(block.name, block.position) is not None:
                with safe_open(self._walk.target / _file(block.position), framework="pt") as handle:
                    self._sum = handle.get_tensor(_SUM)
                return block.position + 1
        return 0

    def _block(self, block: Block, activations: Activations, reentry: Reentry) -> None:
        walk = self._walk
        walk.run.reporter.event("block.start", block=block.name, position=block.position)
        walk.restore(block.position, activations)
        walk.checkpoint.load_module(block.name, walk.device)
        walk.run.reporter.event("block.calibrate", block=block.name, position=block.position)
        sums = Hessian(self._plan.stream.width, walk.device)
        with self._watching(block, sums):
            for batch, recording in zip(activations.batches, activations.recordings, strict=True):
                reentry.advance(block.position, batch, recording)
        if block.position == len(walk.blocks) - 1:
            # What leaves the last block is what the layers behind it read.
            for recording in activations.recordings:
                sums.add(self._unit(recording.hidden[block.stack].to(walk.device)))
        walk.checkpoint.release(block.name)
        try:
            check_sums(sums.tokens, sums.matrix)
        except CalibrationError as error:
            raise CalibrationError(f"{block.name}: {error.message}", error.hint) from error
        self._sum += sums.matrix.cpu().double()
        self._keep(block, activations)

    def _keep(self, block: Block, activations: Activations) -> None:
        walk = self._walk
        file = _file(block.position)
        layout = {_SUM: (self._sum.dtype, tuple(self._sum.shape))}
        size = write_shard(walk.target / file, layout, lambda _: self._sum, lambda _: None)
        last = block.position == len(walk.blocks) - 1
        walk.finish(block.position, UnitRecord(file, [_SUM], size, {}), None if last else activations)
        (walk.target / _file(block.position - 1)).unlink(missing_ok=True)
        self._marker.touch()

    @contextmanager
    def _watching(self, block: Block, sums: Hessian) -> Iterator[None]:
        """Sum up what norms of a block, and readers without a norm, read while the context lasts."""
        norms = self._plan.norms_of(f"{block.name}.", self._walk.blocks)
        behind = {f"{norm.block}.{reader.layer}" for norm in norms for reader in norm.readers}
        bare = [
            name
            for name in self._plan.layers_of(f"{block.name}.", self._walk.blocks)
            if name in self._plan.stream.readers and name not in behind
        ]

        def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            sums.add(self._unit(args[0] if args else next(iter(kwargs.values()))))

        modules = [self._walk.model.get_submodule(name) for name in (*(norm.name for norm in norms), *bare)]
        hooks = [module.register_forward_pre_hook(watch, with_kwargs=True) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _unit(self, hidden: torch.Tensor) -> torch.Tensor:
        """Tokens as rows of one mean square, without their mean where norms take it away."""
        rows = hidden.flatten(0, -2).float()
        if self._plan.stream.keeps_mean:
            rows = rows - rows.mean(1, keepdim=True)
        size = rows.square().mean(1, keepdim=True).sqrt()
        # A token of zeros has no direction; NaN stays NaN.
        return torch.where(size == 0, torch.zeros_like(rows), rows / size)


def _file(position: int) -> str:
    return f"moments-{position:05d}.safetensors"
