"""Holding the narrower model against the wide one without what went, before it is written.

In the wide model the channels and heads that go are zero where they are read, and channels of the residual
stream are zero everywhere with norms over those that stay (`compress.sweep.narrow_model.KeptStream`).
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, final

import torch
from torch import nn

from compress.core.errors import VerificationError
from compress.models.blocks import Block, Recording, Reentry, hidden_state
from compress.models.tasks import resolve
from compress.sweep.narrow_cuts import Cut
from compress.sweep.narrow_model import KeptStream, NarrowModel
from compress.sweep.rewriting import agree
from compress.sweep.walk import Walk


@final
class Proof:
    """Compares on one batch.

    Args:
        walk: the wide model on its way.
        config: of the narrower one.
        stream: channels of the residual stream that stay; ``None`` where all do.
        compute: precision of the blocks.
    """

    def __init__(
        self, walk: Walk, config: Mapping[str, Any], stream: KeptStream | None, compute: torch.dtype
    ) -> None:
        self._walk, self._config, self._stream, self._compute = walk, config, stream, compute
        self._small: NarrowModel | None = None

    def block(
        self,
        block: Block,
        cuts: Mapping[str, Cut],
        zeroed: Mapping[str, torch.Tensor],
        batch: Mapping[str, torch.Tensor],
        recording: Recording,
        reentry: Reentry,
    ) -> None:
        """Hold a narrower block against the wide one. Where the stream is cut the wide one is of no use then.

        Args:
            cuts: of the parameters of the block.
            zeroed: columns that go, by layer.
            recording: of the wide model, in front of the block.

        Raises:
            VerificationError: they say different things.
        """
        walk, stream = self._walk, self._stream
        if self._small is None:
            self._small = self._narrow()
        inside = f"{block.name}."
        names = [name for name, _ in walk.model.named_parameters() if name.startswith(inside)]
        weights = {
            name: cuts[name].of(walk.model.get_parameter(name).detach())
            if name in cuts
            else walk.model.get_parameter(name).detach()
            for name in names
        }
        own = recording if stream is None else stream.recording(recording)
        narrow = hidden_state(self._small.run(block.position, weights, batch, own))
        del weights
        with ExitStack() as masks:
            for layer, columns in zeroed.items():
                module = walk.model.get_submodule(layer)
                masks.callback(module.register_forward_pre_hook(_zeroing(columns)).remove)
            if stream is not None:
                masks.enter_context(stream.masked(names))
            wide = hidden_state(reentry.run(block.position, batch, recording))
        self._agree(block.name, wide if stream is None else stream.of(wide), narrow)

    def outside(self, batch: Mapping[str, torch.Tensor], recording: Recording, reentry: Reentry) -> None:
        """Hold what the narrower model makes of the last hidden state against what the wide one does.

        Raises:
            VerificationError: they say different things.
        """
        walk, stream = self._walk, self._stream
        if stream is None:
            raise ValueError("nothing outside the blocks is cut")
        walk.load_head()
        task = resolve(walk.run.task, walk.source.config)
        position = len(walk.blocks)
        narrow = task.outputs(self._narrow().run(position, {}, batch, stream.recording(recording)))
        inside = tuple(f"{block.name}." for block in walk.blocks)
        names = [name for name, _ in walk.model.named_parameters() if not name.startswith(inside)]
        with stream.masked(names):
            wide = task.outputs(reentry.run(position, batch, recording))
        self._agree("what lies behind the blocks", stream.of(wide), narrow)

    def _narrow(self) -> NarrowModel:
        cuts = None if self._stream is None else self._stream.cuts
        return NarrowModel(self._config, self._walk, self._compute, cuts)

    def _agree(self, part: str, wide: torch.Tensor, narrow: torch.Tensor) -> None:
        same, words = agree(wide, narrow, self._compute)
        if not same:
            raise VerificationError(
                f"{part} is {words} with the same channels at zero",
                "its channels depend on one another in a way that was not seen: report this architecture; "
                "--heads 1, --mlp 1 or --hidden 1 may leave out what does it",
            )


def _zeroing(columns: torch.Tensor) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs = args[0].clone()
        inputs[..., columns.to(inputs.device)] = 0
        return (inputs, *args[1:])

    return hook
