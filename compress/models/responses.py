"""A model without weights that answers what becomes of a factor.

Every linear layer and embedding is a source of fixed random numbers, so no weight is read and no product is
computed. One thing is then changed (some output features of a layer are multiplied, a norm gets other
weights), and what arrives in front of all layers is compared with what arrived before. Everything between
the layers is computed as the model computes it, in double precision.

A matrix that is no layer of its own (a router, fused experts) is a source as well, wherever it is used: it is
seen by the parameter that a function is called with. What it reads is noted under the parameter's name.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from compress.models.blocks import Block, Recording, Reentry
from compress.models.probe import is_linear, output_features
from compress.models.products import product

TOKENS = 6
"""Length of every sequence: what is not a plain product shows at one of them."""

_SMALLEST, _LARGEST = -1.5, 1.0
"""Powers of ten between which sources spread, so that a curve or a limit shows wherever it lies."""


_REMEMBERED = 1 << 22
"""Numbers of one source that are kept while a block is looked at: they are asked for again and again."""

_CASTS = (torch.Tensor.to, torch.Tensor.type, torch.Tensor.type_as, torch.Tensor.float)
"""What a router may do to its weight before it multiplies."""

Edit = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Products:
    """What one matrix that is no linear layer was multiplied with.

    Attributes:
        inputs: float64 ``[tokens, columns]`` of each call; an expert sees the tokens that are sent to it.
        dimensions: of the parameter, counted from its end, that each call summed over; ``None`` for a call
            that is no plain product.
    """

    inputs: list[torch.Tensor] = field(default_factory=list)
    dimensions: list[int | None] = field(default_factory=list)

    @property
    def dimension(self) -> int | None:
        """The dimension that all calls summed over; ``None`` where there is no such one."""
        return self.dimensions[0] if len(set(self.dimensions)) == 1 else None


@dataclass
class Seen:
    """What one run of a block showed.

    Attributes:
        inputs: what each linear layer read, float64 ``[tokens, columns]``, by its path in the block; a layer
            that was called again has more tokens.
        others: what met a matrix that is no linear layer, by the name of the parameter in the block.
        products: the same, as far as they are products.
        outputs: what the block returned.
        entering: the hidden state that went into the block, before it was changed.
    """

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    others: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    products: dict[str, Products] = field(default_factory=dict)
    outputs: list[torch.Tensor] = field(default_factory=list)
    entering: torch.Tensor = field(default_factory=lambda: torch.zeros(0))


@final
class Responses:
    """A model whose matrices are sources, run one block at a time.

    Attributes:
        widths: of what came of products with matrices that are no linear layers in the last run, by the name
            of the parameter in the block.

    Args:
        model: a skeleton in float64 with its parameters on the meta device; of no other use afterwards.
        blocks: of the model.
    """

    def __init__(self, model: Any, blocks: list[Block]) -> None:
        self._model = model
        self._blocks = blocks
        self._inside = tuple(f"{block.name}." for block in blocks)
        self._recordings: dict[int, Recording] = {}
        self._calls: dict[str, int] = {}
        self._drawn: dict[tuple[str, int], torch.Tensor] = {}
        self._edits: Mapping[str, Edit] = {}
        self._seen = Seen()
        self._prefix = ""
        self.widths: dict[str, int] = {}

    def running(self) -> Reentry:
        """Prepare the model; the context in which blocks can be run."""
        if hasattr(self._model, "set_attn_implementation"):
            self._model.set_attn_implementation("eager")
        for name, module in self._model.named_modules():
            if is_linear(module) or isinstance(module, nn.Embedding):
                module.forward = self._source(name, module)
            elif not name.startswith(self._inside):
                fill(module, name)
        self._reentry = Reentry(self._model, self._blocks, torch.device("cpu"))
        return self._reentry

    def prepare(self, block: Block) -> None:
        """Give the small parameters of a block random values, which stay until it is left."""
        for name, module in block.module.named_modules():
            if not is_linear(module):
                fill(module, f"{block.name}.{name}")

    def leave(self, block: Block) -> None:
        """Go on to the next block."""
        for sequences, recording in self._recordings.items():
            self._begin(block, {})
            with self._watch():
                self._reentry.advance(block.position, _batch(sequences), recording)
        self._drawn.clear()
        for module in block.module.modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                module._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def declare(self, sequences: int) -> None:
        """Say before the first block that runs with so many sequences will be asked for."""
        self._recordings[sequences] = Recording()

    def run(
        self,
        block: Block,
        sequences: int,
        edits: Mapping[str, Edit] | None = None,
        entering: Edit | None = None,
    ) -> Seen:
        """What arrives where.

        Args:
            block: whose layers are looked at. One with an empty name stands for everything outside the blocks
                and runs behind the last of them.
            sequences: how many; each of `TOKENS` tokens.
            edits: what becomes of the output of layers and embeddings, by their paths in the model, and of
                products with other matrices, by the names of their parameters.
            entering: what becomes of the hidden state that goes into the block.
        """
        self._begin(block, edits or {})
        recording = self._recordings[sequences]
        seen = self._seen
        if entering is not None:
            # Stacks that have ended are seen by those behind them.
            hidden = {
                stack: values if block.name and stack == block.stack else entering(values)
                for stack, values in recording.hidden.items()
            }
            recording = Recording(hidden, dict(recording.extras))

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            first = None if args else next(iter(kwargs))
            seen.entering = args[0] if first is None else kwargs[first]
            changed = seen.entering if entering is None else entering(seen.entering)
            return ((changed, *args[1:]), kwargs) if first is None else (args, {**kwargs, first: changed})

        hook = block.module.register_forward_pre_hook(enter, with_kwargs=True) if block.name else None
        try:
            with self._watch(), torch.no_grad():
                output = self._reentry.run(block.position, _batch(sequences), recording)
        finally:
            if hook is not None:
                hook.remove()
        seen.outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        return seen

    # -- sources -----------------------------------------------------------------------------------

    def _begin(self, block: Block, edits: Mapping[str, Edit]) -> None:
        self._prefix = f"{block.name}." if block.name else ""
        self._edits = edits
        self._seen = Seen()
        self.widths = {}
        self._calls.clear()

    def _watch(self) -> "_Others":
        # Parameters are looked up by identity; a slice of one knows which it was cut from.
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        return _Others(names, self._met)

    def _met(
        self, name: str, values: list[torch.Tensor], like: torch.Tensor, dimension: int | None
    ) -> torch.Tensor:
        path = name.removeprefix(self._prefix)
        self._seen.others.setdefault(path, []).extend(values)
        products = self._seen.products.setdefault(path, Products())
        products.dimensions.append(dimension)
        # What a product multiplies comes first; a bias may follow.
        products.inputs.append(values[0].reshape(-1, values[0].shape[-1] if values[0].dim() else 1))
        self.widths[path] = like.shape[-1]
        made, edit = self._values(name, tuple(like.shape)), self._edits.get(name)
        return made if edit is None else edit(made)

    def _values(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Random numbers that depend on the name and on how often it was asked for, and on nothing else."""
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        known = self._drawn.get((name, call))
        if known is not None and known.shape == shape:
            return known.clone()
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {call}".encode()))
        powers = torch.rand(shape, generator=generator, dtype=torch.float64)
        signs = torch.randn(shape, generator=generator, dtype=torch.float64)
        values = signs * 10 ** (_SMALLEST + (_LARGEST - _SMALLEST) * powers)
        if values.numel() <= _REMEMBERED:
            self._drawn[(name, call)] = values
        # What a model does in place must not change what it is given next time.
        return values.clone()

    def _source(self, name: str, module: nn.Module) -> Any:
        width = output_features(module) if is_linear(module) else int(module.get_parameter("weight").shape[1])

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            inputs = args[0] if args else next(iter(kwargs.values()))
            values = self._values(
                name, (*inputs.shape[:-1], width) if is_linear(module) else (*inputs.shape, width)
            )
            if is_linear(module) and name.startswith(self._prefix):
                path, rows = name.removeprefix(self._prefix), inputs.reshape(-1, inputs.shape[-1]).clone()
                before = self._seen.inputs.get(path)
                self._seen.inputs[path] = rows if before is None else torch.cat([before, rows])
            edit = self._edits.get(name)
            return values if edit is None else edit(values)

        return forward


class _Others(TorchFunctionMode):
    """Puts a source in the place of every product with a parameter that has no memory."""

    def __init__(self, names: Mapping[int, str], met: Any) -> None:
        super().__init__()
        self._names = dict(names)
        self._held: list[torch.Tensor] = []
        self._met = met

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((*args, *kwargs.values()))
        without = [tensor for tensor in tensors if tensor.is_meta]
        if not without:
            return func(*args, **kwargs)
        values = [t for t in tensors if not t.is_meta and t.is_floating_point()]
        if not values:
            made = func(*args, **kwargs)
            if func in _CASTS and id(without[0]) in self._names:
                # What was cast acts as the parameter itself. Held, so that its identity stays its own.
                self._names[id(made)] = self._names[id(without[0])]
                self._held.append(made)
            return made
        moved = tree_map(
            lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs)
        )
        like = func(*moved[0], **moved[1])
        names = [self._names.get(id(t)) or self._names.get(id(t._base)) for t in without]
        name = next((found for found in names if found is not None), "a matrix")
        times, dimension = product(func, args, kwargs), None
        if times is not None and times.matrix is without[0]:
            matrix = times.matrix if times.matrix._base is None else times.matrix._base
            dimension = times.dimension_of(matrix)
        return self._met(name, [value.clone() for value in values], like, dimension)


def _tensors(arguments: Iterable[Any]) -> list[torch.Tensor]:
    """All tensors among the arguments of a function, which may hold lists of them."""
    found: list[torch.Tensor] = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found += _tensors(argument)
    return found


def fill(module: nn.Module, name: str) -> None:
    """Give the vectors among a module's own parameters random values between a half and one and a half."""
    for leaf, parameter in list(module.named_parameters(recurse=False)):
        if parameter.dim() < 2:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{name}.{leaf}".encode()))
            values = 0.5 + torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            module._parameters[leaf] = nn.Parameter(values, requires_grad=False)


def _batch(sequences: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.zeros(sequences, TOKENS, dtype=torch.long)}
