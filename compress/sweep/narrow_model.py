"""The smaller model beside the wide one: the same parts outside the blocks, and one block at a time."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, final

import torch
from torch import nn

from compress.models.blocks import Recording, Reentry, find_blocks
from compress.models.poison import over_channels
from compress.sweep.config_search import model_of
from compress.sweep.narrow_cuts import Cut
from compress.sweep.narrow_hidden import Hidden
from compress.sweep.walk import Walk


@final
class NarrowModel:
    """Runs single blocks of the model that a configuration describes.

    Args:
        config: of the smaller model, narrower or with fewer blocks.
        walk: the wide model, whose parts outside the blocks are loaded; they are shared, and copied only
            where they are cut.
        compute: precision of the blocks.
        cuts: what stays of parameters outside the blocks, by name.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        walk: Walk,
        compute: torch.dtype,
        cuts: Mapping[str, Cut] | None = None,
    ) -> None:
        cuts = cuts or {}
        self._model = model_of(walk.source, config, walk.run, compute)
        self._blocks = find_blocks(self._model)
        self._device = walk.device
        # Of the wide model: where blocks were taken out it has more of them.
        inside = tuple(f"{block.name}." for block in walk.blocks)
        with torch.no_grad():
            for name, parameter in walk.model.named_parameters(remove_duplicate=False):
                if not name.startswith(inside):
                    there = name in cuts and parameter.device.type != "meta"
                    own = nn.Parameter(cuts[name].of(parameter), requires_grad=False) if there else parameter
                    _put(self._model, name, own)
        for name, buffer in list(self._model.named_buffers()):
            module, _, leaf = name.rpartition(".")
            self._model.get_submodule(module)._buffers[leaf] = buffer.to(walk.device)

    def run(
        self,
        position: int,
        weights: Mapping[str, torch.Tensor],
        batch: Mapping[str, torch.Tensor],
        recording: Recording,
    ) -> Any:
        """What one block returns, or behind the last of them the model.

        Args:
            weights: its parameters by their names in the model; let go again afterwards.
            recording: of the blocks before.
        """
        for name, tensor in weights.items():
            _put(self._model, name, nn.Parameter(tensor, requires_grad=False))
        try:
            with Reentry(self._model, self._blocks, self._device) as reentry:
                return reentry.run(position, batch, recording)
        finally:
            for name, tensor in weights.items():
                _put(self._model, name, nn.Parameter(tensor.to("meta"), requires_grad=False))


def _put(model: Any, name: str, parameter: nn.Parameter) -> None:
    module, _, leaf = name.rpartition(".")
    model.get_submodule(module)._parameters[leaf] = parameter


@final
class KeptStream:
    """The channels of the residual stream that stay, and the wide model without the others.

    In that model the others are zero wherever they are read or written, and each norm takes its statistic of
    those that stay: the mean of their squares, or their mean and variance.

    Attributes:
        kept: int64, the channels that stay, in order.
        cuts: of all parameters that have a place for each channel.

    Args:
        hidden: what is cut.
        kept: the channels that stay.
        model: the wide model.
    """

    def __init__(self, hidden: Hidden, kept: torch.Tensor, model: Any) -> None:
        self.kept = kept
        self.cuts = hidden.cuts(model, kept)
        self._hidden, self._model = hidden, model

    def recording(self, recording: Recording) -> Recording:
        """What was recorded, as the narrow model has it."""
        hidden = {stack: values[..., self.kept] for stack, values in recording.hidden.items()}
        return Recording(hidden, dict(recording.extras))

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The channels that stay of a hidden state; logits as they are."""
        if values.shape[-1] != self._hidden.residual.width:
            return values
        return values[..., self.kept.to(values.device)]

    def statistics(self, *, inside: bool = False) -> AbstractContextManager[None]:
        """A context in which norms of the wide model see the channels that stay.

        Args:
            inside: whether a norm is entered already.
        """
        residual = self._hidden.residual
        return over_channels(self._model, residual.norms, self.kept, residual.width, inside=inside)

    @contextmanager
    def masked(self, names: Iterable[str]) -> Iterator[None]:
        """The wide model without the other channels. Parameters lose them for good: they are let go soon.

        Args:
            names: of the parameters that are in memory.
        """
        with torch.no_grad():
            for name in names:
                parameter = self._model.get_parameter(name)
                for dimension, kept in self.cuts[name].places.items() if name in self.cuts else ():
                    mask = torch.zeros(parameter.shape[dimension], dtype=parameter.dtype)
                    mask[kept] = 1
                    shape = [-1 if place == dimension else 1 for place in range(parameter.dim())]
                    parameter.mul_(mask.to(parameter.device).view(shape))
        with self.statistics():
            yield
