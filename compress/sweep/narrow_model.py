"""The smaller model beside the wide one: the same parts outside the blocks, and one block at a time."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import nn

from compress.models.blocks import Recording, Reentry, find_blocks
from compress.sweep.config_search import model_of
from compress.sweep.walk import Walk


@final
class NarrowModel:
    """Runs single blocks of the model that a configuration describes.

    Args:
        config: of the smaller model, narrower or with fewer blocks.
        walk: the wide model, whose parts outside the blocks are loaded; they are shared, not copied.
        compute: precision of the blocks.
    """

    def __init__(self, config: Mapping[str, Any], walk: Walk, compute: torch.dtype) -> None:
        self._model = model_of(walk.source, config, walk.run, compute)
        self._blocks = find_blocks(self._model)
        self._device = walk.device
        # Of the wide model: where blocks were taken out it has more of them.
        inside = tuple(f"{block.name}." for block in walk.blocks)
        for name, parameter in walk.model.named_parameters(remove_duplicate=False):
            if not name.startswith(inside):
                _put(self._model, name, parameter)
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
        """What one block returns.

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
