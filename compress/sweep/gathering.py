"""The inputs of all matrices of one block as it is, over all calibration batches at once."""

from collections.abc import Callable, Sequence
from typing import Any

from compress.models.blocks import Block, Reentry
from compress.numerics.statistic import Statistic
from compress.sweep.activations import Activations
from compress.sweep.collector import Collector, Enough, Shared
from compress.sweep.matrices import Matrix


def gathered(
    model: Any,
    matrices: Sequence[Matrix],
    block: Block,
    reentry: Reentry,
    activations: Activations,
    new: Callable[[int], Statistic] | None,
) -> list[list[Shared]]:
    """Which matrices of a block share an input, in stages, each with the statistic of it.

    Args:
        model: whose block is in memory.
        matrices: of the block.
        new: makes a statistic for an input of so many columns; ``None`` where none is wanted, and only the
            first batch runs.
    """
    collector = Collector(model, matrices)
    stages = collector.discover(
        lambda: reentry.run(block.position, activations.batches[0], activations.recordings[0])
    )
    if new is None:
        return stages
    together = [shared for stage in stages for shared in stage]
    with collector.gather(together, new) as begin:
        for batch, recording in zip(activations.batches, activations.recordings, strict=True):
            begin()
            try:
                reentry.run(block.position, batch, recording)
            except Enough:
                continue
    return stages
