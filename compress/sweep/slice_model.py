"""The narrow model beside the wide one: outside its blocks whole, and one block at a time."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import nn

from compress.models.blocks import Reentry, find_blocks
from compress.sweep.config_search import model_of
from compress.sweep.walk import Walk


@final
class SlicedModel:
    """A model of the narrow shape whose parameters are put in as they are made.

    Attributes:
        model: the module; its parameters lie on the meta device until they are put in.

    Args:
        config: its ``config.json``.
        walk: of the wide model, from which comes what is the same in both.
    """

    def __init__(self, config: Mapping[str, Any], walk: Walk) -> None:
        self.model = model_of(walk.source, config, walk.run, walk.model.dtype)
        self._walk = walk
        self._blocks = find_blocks(self.model)
        for name, buffer in list(self.model.named_buffers()):
            module, _, leaf = name.rpartition(".")
            self.model.get_submodule(module)._buffers[leaf] = buffer.to(walk.device)

    def running(self) -> Reentry:
        """What runs single blocks while the context lasts."""
        return Reentry(self.model, self._blocks, self._walk.device)

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give parameters values, in the precision in which the model computes."""
        for name, tensor in tensors.items():
            values = tensor.to(self._walk.device, self.model.dtype)
            self._set(name, nn.Parameter(values, requires_grad=False))

    def fill(self, prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give all parameters of a block values: new ones, or those of the wide model."""
        for name, parameter in self._walk.model.named_parameters():
            if name.startswith(prefix) and name not in tensors:
                self._set(name, parameter)
        self.put(tensors)

    def fill_outside(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give what lies outside the blocks values, as far as the wide model has them in memory."""
        inside = tuple(f"{block.name}." for block in self._blocks)
        for name, parameter in self._walk.model.named_parameters():
            if not name.startswith(inside) and name not in tensors:
                self._set(name, parameter)
        self.put(tensors)

    def release(self, prefix: str) -> None:
        """Let the parameters of a block go."""
        for name, parameter in list(self.model.named_parameters()):
            if name.startswith(prefix):
                self._set(name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        module, _, leaf = name.rpartition(".")
        self.model.get_submodule(module)._parameters[leaf] = parameter
