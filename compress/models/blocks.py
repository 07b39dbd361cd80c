"""Where a model's stacks of blocks are, and how one block is run by re-entering the model's forward.

A stack is a list of blocks that hand a hidden state from one to the next. To run block k, the model's
own forward is called: the blocks before k return what was recorded, block k runs, and the call is
stopped. So every argument that the model computes for a block (masks for sliding windows, rotary
embeddings of its layer type, shared biases) is the right one, whatever the architecture.
"""

from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compress.core.errors import ModelError


@dataclass(frozen=True)
class Block:
    """One block of a stack.

    Attributes:
        name: its module path.
        module: the module.
        stack: index of its stack; an encoder-decoder has two.
        position: over all stacks, in the order in which the model runs them.
    """

    name: str
    module: nn.Module
    stack: int
    position: int


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of all stacks, in order.

    A stack is an outermost `ModuleList` whose members hold weight matrices. That is where transformers
    keeps the layers of every encoder and decoder, and it needs no list of architectures.

    Raises:
        ModelError: the model has no such list.
    """
    blocks: list[Block] = []
    stack = 0
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            inside.append(name)
            if not all(_holds_matrices(member) for member in module):
                continue
            for index, member in enumerate(module):
                blocks.append(Block(f"{name}.{index}", member, stack, len(blocks)))
            stack += 1
    if not blocks:
        raise ModelError(
            f"{type(model).__name__} has no stack of blocks (no torch.nn.ModuleList with weight matrices)",
            "only models built from a list of layers can be compressed block by block",
        )
    return blocks


def _holds_matrices(module: nn.Module) -> bool:
    return sum(parameter.dim() >= 2 for parameter in module.parameters()) >= 2


@dataclass
class Recording:
    """What one batch left behind: the hidden state of each stack, and what blocks return beside it.

    Attributes:
        hidden: stack index to the output of the last block that ran, ``[sequences, length, width]``.
        extras: block position to what it returned beside the hidden state (shared position biases).
    """

    hidden: MutableMapping[int, torch.Tensor] = field(default_factory=dict)
    extras: MutableMapping[int, tuple[Any, ...]] = field(default_factory=dict)

    def held(self) -> "Recording":
        """A recording in memory that stays while this one goes on to the next block."""
        return Recording(dict(self.hidden), dict(self.extras))


class _Stop(Exception):
    """Ends a forward pass once the block of interest has run."""


class Reentry:
    """Runs single blocks of a model through the model's own forward.

    Use it as a context manager: it replaces the forward of every block and puts it back afterwards.
    """

    def __init__(self, model: nn.Module, blocks: list[Block], device: torch.device) -> None:
        self._model = model
        self._blocks = blocks
        self._device = device
        self._current = -1
        self._recording = Recording()
        self._output: Any = None
        self._onward = False
        sizes = Counter(block.stack for block in blocks)
        self._alone = {block.position for block in blocks if sizes[block.stack] == 1}

    def __enter__(self) -> "Reentry":
        for block in self._blocks:
            block.module.forward = self._forward(block, block.module.forward)
        return self

    def __exit__(self, *_: object) -> None:
        for block in self._blocks:
            del block.module.forward

    def run(
        self,
        position: int,
        batch: Mapping[str, torch.Tensor],
        recording: Recording,
        *,
        gradients: bool = False,
    ) -> Any:
        """The output of one block for one batch, with the blocks before it replayed from the recording.

        ``position`` equal to the number of blocks replays them all and returns the model's own output.

        Args:
            gradients: whether the output can be differentiated by the parameters that require it.

        Raises:
            ModelError: the model never called the block, or not in order.
        """
        self._begin(position, recording, onward=False)
        inputs = self._inputs(batch)
        with torch.set_grad_enabled(gradients):
            try:
                output = self._model(**inputs, **self._without_cache())
            except _Stop:
                return self._taken()
        if position < len(self._blocks):
            if self._output is not None:
                return self._taken()
            raise ModelError(
                f"the model never ran its block {self._blocks[position].name}",
                "leave the stack out, or give inputs that reach it",
            )
        return output

    def finish(self, position: int, batch: Mapping[str, torch.Tensor], recording: Recording) -> Any:
        """The model's own output for one batch, with the blocks before one replayed from the recording.

        The block and all that follow run as they are, so they have to be in memory.
        """
        self._begin(position, recording, onward=True)
        inputs = self._inputs(batch)
        with torch.no_grad():
            return self._model(**inputs, **self._without_cache())

    def _begin(self, position: int, recording: Recording, *, onward: bool) -> None:
        """Make ready for one call; a recording that lies on disk is read once, and not for every block."""
        self._current, self._recording, self._output, self._onward = position, recording.held(), None, onward

    def _taken(self) -> Any:
        """The output of the block; what is not held here is free as soon as the caller lets it go."""
        output, self._output = self._output, None
        return output

    def advance(self, position: int, batch: Mapping[str, torch.Tensor], recording: Recording) -> None:
        """Run a block and record its output, so that the next block sees it."""
        output = self.run(position, batch, recording)
        hidden, extras = _split(output)
        recording.hidden[self._blocks[position].stack] = hidden.detach().to("cpu")
        if any(isinstance(extra, torch.Tensor) for extra in extras) or isinstance(output, tuple):
            recording.extras[position] = tuple(
                extra.detach().to("cpu") if isinstance(extra, torch.Tensor) else extra for extra in extras
            )

    def _inputs(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the model is called with; a decoder behind an encoder reads the same tokens."""
        inputs = {name: tensor.to(self._device) for name, tensor in batch.items()}
        config = getattr(self._model, "config", None)
        if getattr(config, "is_encoder_decoder", False) and "input_ids" in inputs:
            inputs.setdefault("decoder_input_ids", inputs["input_ids"])
        return inputs

    def _without_cache(self) -> dict[str, Any]:
        config = getattr(self._model, "config", None)
        return {"use_cache": False} if getattr(config, "use_cache", None) is not None else {}

    def _forward(self, block: Block, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if block.position < self._current:
                return self._replay(block)
            if self._onward:
                return original(*args, **kwargs)
            if block.position > self._current:
                if self._output is not None:
                    raise _Stop
                raise ModelError(
                    f"block {block.name} ran before block {self._blocks[self._current].name}",
                    "the model does not run its blocks in the order of their names",
                )
            self._output = original(*args, **kwargs)
            if block.position in self._alone:
                # A stack of one may be a block that the model runs again and again (ALBERT): let it.
                return self._output
            raise _Stop

        return forward

    def _replay(self, block: Block) -> Any:
        hidden = self._recording.hidden[block.stack].to(self._device)
        if block.position not in self._recording.extras:
            return hidden
        extras = (
            extra.to(self._device) if isinstance(extra, torch.Tensor) else extra
            for extra in self._recording.extras[block.position]
        )
        return (hidden, *extras)


def hidden_state(output: Any) -> torch.Tensor:
    """The hidden state ``[sequences, length, width]`` in what a block returned.

    Raises:
        ModelError: there is none.
    """
    return _split(output)[0]


def _split(output: Any) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """The hidden state that a block returned, and the rest."""
    if isinstance(output, torch.Tensor):
        return output, ()
    if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        return output[0], tuple(output[1:])
    raise ModelError(
        f"a block returned {type(output).__name__}, expected a hidden state or a tuple that starts with one"
    )
