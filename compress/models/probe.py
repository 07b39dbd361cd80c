"""A model whose linear layers give zeros, and in which NaN shows where one output feature goes.

Every linear layer and embedding is replaced by a source of zeros, so that no weight is needed and no product
is computed. One output feature poisoned with NaN arrives wherever it is read, because a NaN survives every
activation, gate, rotation, norm and softmax; the next linear layer notes it and stops it. Many features are
tried in one forward pass, each set of them in a sequence of its own.
"""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.models.blocks import Block, Recording, Reentry

_PROBES = 256
"""Sets of features that are poisoned in one forward pass, each in a sequence of its own."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies its input by one matrix: a linear layer, or GPT-2's transposed one."""
    return isinstance(module, nn.Linear | Conv1D)


def output_dimension(module: nn.Module, leaf: str) -> int | None:
    """The dimension of a layer's parameter that counts its output features; ``None`` where none does.

    Args:
        leaf: ``weight`` or ``bias``.
    """
    if leaf == "bias":
        return 0
    if leaf != "weight":
        return None
    return 1 if isinstance(module, Conv1D) else 0


def input_dimension(module: nn.Module) -> int:
    """The dimension of a layer's weight that counts its input columns."""
    return 0 if isinstance(module, Conv1D) else 1


def output_features(module: nn.Module) -> int:
    """How many output features a linear layer has."""
    return int(module.nf) if isinstance(module, Conv1D) else int(module.get_parameter("weight").shape[0])


def input_features(module: nn.Module) -> int:
    """How many input columns a linear layer has."""
    return int(module.get_parameter("weight").shape[input_dimension(module)])


@final
class Probe:
    """A model whose linear layers and embeddings give zeros, run one block at a time.

    Attributes:
        reached_output: whether the last poison arrived at what the block returns.
    """

    def __init__(self, model: Any, blocks: list[Block]) -> None:
        self._model = model
        self._blocks = blocks
        self._inside = tuple(f"{block.name}." for block in blocks)
        self._recording = Recording()
        self._batch = {"input_ids": torch.zeros(_PROBES, 1, dtype=torch.long)}
        self._seen: dict[str, torch.Tensor] = {}
        self._poisoned: str | None = None
        self._poison = torch.zeros(0)
        self.reached_output = False

    def running(self) -> Reentry:
        """Prepare the model; the context in which blocks can be run."""
        for name, module in self._model.named_modules():
            if is_linear(module) or isinstance(module, nn.Embedding):
                module.forward = self._source(name, module)
            elif not name.startswith(self._inside):
                _fill(module)
        self._reentry = Reentry(self._model, self._blocks, torch.device("cpu"))
        return self._reentry

    def advance(self, block: Block) -> None:
        """Go on to the next block."""
        for module in block.module.modules():
            if not is_linear(module):
                _fill(module)
        self._poisoned = None
        self._reentry.advance(block.position, self._batch, self._recording)
        for module in block.module.modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                module._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def readers_of_the_input(self, block: Block) -> set[str]:
        """Layers of a block that what goes into the block reaches, by their paths inside it."""

        def poison(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if args:
                return (torch.full_like(args[0], torch.nan), *args[1:]), kwargs
            first = next(iter(kwargs))
            return args, {**kwargs, first: torch.full_like(kwargs[first], torch.nan)}

        hook = block.module.register_forward_pre_hook(poison, with_kwargs=True)
        try:
            self._run(block)
        finally:
            hook.remove()
        return {
            name
            for name, module in block.module.named_modules()
            if is_linear(module) and bool(self._seen_at(block, name, input_features(module)).any())
        }

    def reach(self, block: Block, layer: str, sets: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """The columns of every layer of a block that sets of output features of one layer reach.

        Returns:
            bool ``[sets, columns]`` by the path of a layer inside the block.
        """
        module = block.module.get_submodule(layer)
        readers = {
            name: input_features(entry) for name, entry in block.module.named_modules() if is_linear(entry)
        }
        found: dict[str, list[torch.Tensor]] = {name: [] for name in readers}
        self.reached_output = False
        for start in range(0, len(sets), _PROBES):
            part = sets[start : start + _PROBES]
            self._poison = torch.zeros(_PROBES, 1, output_features(module))
            for place, rows in enumerate(part):
                self._poison[place, 0, list(rows)] = torch.nan
            self._poisoned = f"{block.name}.{layer}"
            output = self._run(block)
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            self.reached_output = self.reached_output or bool(hidden.isnan().any())
            for name, columns in readers.items():
                found[name].append(self._seen_at(block, name, columns)[: len(part)])
        self._poisoned = None
        return {name: torch.cat(entries) for name, entries in found.items()}

    def _run(self, block: Block) -> Any:
        for module in block.module.modules():
            if not is_linear(module):
                _fill(module)
        self._seen.clear()
        return self._reentry.run(block.position, self._batch, self._recording)

    def _seen_at(self, block: Block, layer: str, columns: int) -> torch.Tensor:
        """Where NaN arrived in front of a layer, bool ``[probes, columns]``."""
        seen = self._seen.get(f"{block.name}.{layer}")
        return torch.zeros(_PROBES, columns, dtype=torch.bool) if seen is None else seen

    def _source(self, name: str, module: nn.Module) -> Any:
        width = output_features(module) if is_linear(module) else int(module.get_parameter("weight").shape[1])

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            inputs = args[0] if args else next(iter(kwargs.values()))
            if not is_linear(module):
                return torch.zeros(*inputs.shape, width)
            arrived = inputs.isnan().reshape(-1, inputs.shape[-1])
            if arrived.shape[0] == _PROBES:
                before = self._seen.get(name)
                self._seen[name] = arrived if before is None else before | arrived
            zeros = torch.zeros(*inputs.shape[:-1], width)
            return zeros + self._poison.reshape(zeros.shape) if name == self._poisoned else zeros

        return forward


def _fill(module: nn.Module) -> None:
    """Give a module's own parameters real memory of zeros."""
    for leaf, parameter in list(module.named_parameters(recurse=False)):
        if parameter.device.type == "meta":
            module._parameters[leaf] = nn.Parameter(
                torch.zeros(parameter.shape, dtype=parameter.dtype), requires_grad=False
            )
