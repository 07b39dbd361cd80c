"""What a model computes on its way: hidden states, and the queries, keys and values of its attention.

They are recorded while the model's own forward runs. A *layer* is one run of a block (`find_blocks`), so
that a model that runs one block again and again (ALBERT) has as many layers as runs. Hidden states are
what goes into the first block and what each block returns.

Queries, keys and values are taken where they meet: every model of transformers hands them to an attention
function that it looks up by the name of its implementation, and while something is recorded that name
stands for a function that takes note and calls the model's own. So no architecture's names are known
here, it does not matter whether a model keeps the three in one matrix, and what is found is what the
model attends by, after rotations and norms of its own, with as many heads for keys as there are. A model
that does its attention by itself has nothing to take note of; `survey` says so when a chain is planned,
from the configuration alone.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compress.core.errors import ModelError
from compress.models.blocks import Block, find_blocks, hidden_state
from compress.models.load import quiet
from compress.models.probe import Probe

_IMPLEMENTATIONS = ("sdpa", "eager")
"""What the attention of a model that is loaded here may go by."""


@dataclass(frozen=True)
class Attended:
    """What one layer attends by.

    Attributes:
        queries: ``[batch, heads, length, width]``.
        keys: ``[batch, key heads, length, width]``.
        values: ``[batch, key heads, length, value width]``.
        scale: what products of queries and keys are multiplied by.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scale: float


@dataclass
class Record:
    """What one forward pass left behind; layers are counted from 1.

    Attributes:
        embedded: what went into the first block, ``[batch, length, width]``.
        hidden: what layers returned.
        attended: what layers attend by.
        layers: how many ran.
    """

    embedded: torch.Tensor | None = None
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    attended: dict[int, Attended] = field(default_factory=dict)
    layers: int = 0


@dataclass(frozen=True)
class Heads:
    """The shape of a layer's attention: heads, and their widths, of queries, keys and values."""

    heads: int
    key_heads: int
    width: int
    value_width: int

    @property
    def widths(self) -> tuple[int, int, int]:
        """Numbers of a position in all queries, keys and values."""
        return self.heads * self.width, self.key_heads * self.width, self.key_heads * self.value_width


@dataclass(frozen=True)
class Interior:
    """What a model has inside.

    Attributes:
        layers: how many.
        width: of the hidden state.
        heads: by layer, for those whose attention can be recorded.
    """

    layers: int
    width: int
    heads: Mapping[int, Heads]


class Recorder:
    """Takes note of one model's inside.

    Args:
        model: a model of transformers with one stack of blocks.
        attention: whether queries, keys and values are wanted.
        layers: numbers of the layers that are wanted; all of them where none is given.

    Attributes:
        record: of the last forward pass that was recorded.
    """

    def __init__(self, model: nn.Module, *, attention: bool, layers: frozenset[int] | None = None) -> None:
        self._blocks = _stack(model)
        self._attention = attention
        self._layers = layers
        self._open = 0
        self.record = Record()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward pass of the model that is run inside."""
        self.record, self._open = Record(), 0
        with contextlib.ExitStack() as stack:
            for block in self._blocks:
                before = block.module.register_forward_pre_hook(self._enter, with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(block.module.register_forward_hook(self._leave).remove)
            if self._attention:
                stack.enter_context(self._noting())
            yield

    def _wanted(self, layer: int) -> bool:
        return self._layers is None or layer in self._layers

    def _enter(self, _: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if self.record.layers == 0:
            self.record.embedded = arguments[0] if arguments else next(iter(named.values()))
        self.record.layers += 1
        self._open = self.record.layers

    def _leave(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if self._wanted(self._open):
            self.record.hidden[self._open] = hidden_state(output)
        self._open = 0

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """Stand in for the attention functions, under the names by which models look them up."""
        before = {name: ALL_ATTENTION_FUNCTIONS.get(name) for name in _IMPLEMENTATIONS}
        for name, original in before.items():
            ALL_ATTENTION_FUNCTIONS[name] = self._noted(original)
        try:
            yield
        finally:
            for name in before:
                del ALL_ATTENTION_FUNCTIONS[name]

    def _noted(self, original: Callable[..., Any] | None) -> Callable[..., Any]:
        def attention(
            module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            *arguments: Any,
            **named: Any,
        ) -> Any:
            if self._open and self._wanted(self._open):
                scale = named.get("scaling")
                self.record.attended[self._open] = Attended(
                    query, key, value, float(query.shape[-1] ** -0.5 if scale is None else scale)
                )
            # The eager one is no registered function: each architecture has its own, beside its classes.
            function = original or sys.modules[type(module).__module__].eager_attention_forward
            return function(module, query, key, value, *arguments, **named)

        return attention


def survey(model: Any) -> Interior:
    """What a model has inside, without its weights.

    Args:
        model: a skeleton with its parameters on the meta device; it is of no other use afterwards.

    Raises:
        ModelError: the model has no stack of blocks or more than one, or does not run its blocks in order.
    """
    blocks = _stack(model)
    recorder = Recorder(model, attention=True)
    layers, width = 0, 0
    heads: dict[int, Heads] = {}
    probe = Probe(model, blocks)
    with quiet(), probe.running():
        for block in blocks:
            with recorder.recording():
                probe.advance(block)
            layers = max(layers, recorder.record.layers)
            embedded = recorder.record.embedded
            width = int(embedded.shape[-1]) if embedded is not None else width
            for layer, found in recorder.record.attended.items():
                _, count, _, size = found.queries.shape
                heads[layer] = Heads(
                    int(count), int(found.keys.shape[1]), int(size), int(found.values.shape[3])
                )
    return Interior(layers, width, heads)


def _stack(model: nn.Module) -> list[Block]:
    blocks = find_blocks(model)
    stacks = len({block.stack for block in blocks})
    if stacks > 1:
        raise ModelError(
            f"{type(model).__name__} has {stacks} stacks of blocks, each with hidden states of its own",
            "only what a model with one stack computes inside can be learned",
        )
    return blocks
