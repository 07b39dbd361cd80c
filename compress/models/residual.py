"""Which entries of which parameters belong to a channel of the residual stream, found from the model itself.

A channel of the hidden state is a row of every layer that writes it (embeddings among them), a column of
every layer that reads it, and an entry of every norm between them. Which those are depends on the
architecture, and no table of names says so here. In a model whose matrices are sources of random numbers
(`compress.models.responses`) one thing is poisoned with NaN: a channel of what enters a block, a feature of a
layer, an entry of a norm. Where NaN arrives in front of layers, and in what leaves, is what belongs to it.

A norm takes a statistic of all channels, and so does nothing else between blocks. A statistic hands on no
poison here, so that a channel's way through a norm stays its own; a model that mixes channels otherwise shows
NaN everywhere and is refused. What reads or writes the stream in another order than the model's is refused
too: one set of channels is cut everywhere.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from compress.core.errors import PlanError
from compress.models.blocks import Block, find_blocks
from compress.models.fold_search import signature
from compress.models.load import quiet
from compress.models.probe import input_dimension, is_linear, output_dimension, output_features
from compress.models.responses import Edit, Responses, Seen

_SEQUENCES: Final = 2
_HINT: Final = "leave the hidden size as it is, and prune channels, heads or blocks"
_ENTERING: Final = "what enters"
_LEAVING: Final = "what leaves"

STATISTICS: Final = frozenset(
    {
        torch.mean,
        torch.Tensor.mean,
        torch.sum,
        torch.Tensor.sum,
        torch.var,
        torch.Tensor.var,
        torch.std,
        torch.Tensor.std,
        torch.norm,
        torch.Tensor.norm,
        torch.linalg.vector_norm,
        torch.linalg.norm,
    }
)
"""Functions that say one thing of all channels."""
NORMS: Final = frozenset(
    {torch.nn.functional.layer_norm, torch.layer_norm, torch.nn.functional.rms_norm, torch.rms_norm}
)
"""Functions that take such a statistic and divide by it."""


@dataclass(frozen=True)
class Residual:
    """What of a model has a place for each channel of the residual stream.

    Attributes:
        width: channels, the hidden size.
        readers: linear layers whose input columns are channels, by their paths.
        writers: linear layers and embeddings whose output features are channels.
        vectors: parameters with an entry for each channel, by their names.
        others: parameters that are no linear layer (routers, fused experts) by their names, with how many of
            their dimensions count channels.
        norms: modules that take a statistic of all channels.
        followers: linear layers behind the stream that read it and whose own features a configuration may
            count by the hidden size as well (BERT's pooler), and those that read them.
    """

    width: int
    readers: frozenset[str]
    writers: frozenset[str]
    vectors: frozenset[str]
    others: Mapping[str, int]
    norms: frozenset[str]
    followers: frozenset[str]

    def dimensions(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """The dimensions of parameters that count channels, as far as layers and vectors say them."""
        found: dict[str, set[int]] = {name: {0} for name in self.vectors}
        for path in self.readers:
            found.setdefault(f"{path}.weight", set()).add(input_dimension(model.get_submodule(path)))
        for path in self.writers:
            module = model.get_submodule(path)
            for leaf, _ in module.named_parameters(recurse=False):
                dimension = output_dimension(module, leaf) if is_linear(module) else 1
                if dimension is not None:
                    found.setdefault(f"{path}.{leaf}", set()).add(dimension)
        return {name: tuple(sorted(places)) for name, places in found.items()}


@contextmanager
def over_channels(
    model: nn.Module, norms: Iterable[str], kept: torch.Tensor, width: int, *, inside: bool = False
) -> Iterator[None]:
    """A wide model whose norms take their statistics of some channels only, while the context lasts.

    That is what a model without the other channels computes: the mean of squares, or mean and variance, over
    the channels that stay. What a norm gives for the others is of no meaning.

    Args:
        model: the wide model.
        norms: its modules that take a statistic of all channels.
        kept: int64, the channels that stay, in order.
        width: of all channels.
        inside: whether a norm is entered already.
    """
    mode = _KeptChannels(kept, width, inside=inside)
    with ExitStack() as hooks, mode:
        for name in norms:
            module = model.get_submodule(name)
            hooks.callback(module.register_forward_pre_hook(mode.enter).remove)
            hooks.callback(module.register_forward_hook(mode.leave).remove)
        yield


@final
class _KeptChannels(TorchFunctionMode):
    """Functions inside norms see some channels only."""

    def __init__(self, kept: torch.Tensor, width: int, *, inside: bool) -> None:
        super().__init__()
        self._kept, self._width = kept, width
        self._inside = int(inside)

    def enter(self, *_: object) -> None:
        """A norm is entered."""
        self._inside += 1

    def leave(self, *_: object) -> None:
        """A norm is left."""
        self._inside -= 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._inside or (func not in STATISTICS and func not in NORMS):
            return func(*args, **kwargs)
        some = func(
            *(self._restricted(value) for value in args),
            **{name: self._restricted(value) for name, value in kwargs.items()},
        )
        if func in STATISTICS:
            return some
        whole = torch.zeros(*some.shape[:-1], self._width, dtype=some.dtype, device=some.device)
        return whole.index_copy(-1, self._kept.to(some.device), some)

    def _restricted(self, value: Any) -> Any:
        """An argument as it is for the channels that stay."""
        if isinstance(value, torch.Tensor):
            counts = value.ndim > 0 and value.shape[-1] == self._width
            return value.index_select(-1, self._kept.to(value.device)) if counts else value
        if isinstance(value, tuple | list) and list(value) == [self._width]:
            return (len(self._kept),)
        return value


def find_residual(model: Any) -> Residual:
    """Find what reads and writes the residual stream.

    Args:
        model: a skeleton in float64 with its parameters on the meta device; it is of no other use afterwards.

    Raises:
        PlanError: a channel's way through the model is not its own, with the reason.
    """
    blocks = find_blocks(model)
    responses = Responses(model, blocks)
    responses.declare(_SEQUENCES)
    elementwise = _Elementwise()
    outside = _outside(model, blocks)
    found = _Found()
    known: dict[object, _Found] = {}
    stacks: set[int] = set()
    width = 0
    with quiet(), responses.running(), elementwise, elementwise.watching(model):
        for block in blocks:
            responses.prepare(block)
            if block.stack not in stacks:
                stacks.add(block.stack)
                width = _entrance(responses, elementwise, block, outside, width, found)
            alike = signature(block.module)
            if alike not in known:
                modules = dict(block.module.named_modules())
                known[alike] = _Search(responses, elementwise, block, modules, width).run()
            found.add(known[alike], block.name)
            responses.leave(block)
        end = Block("", model, blocks[-1].stack, len(blocks))
        found.add(_Search(responses, elementwise, end, outside, width).run(), "")
    return found.residual(width)


def _outside(model: nn.Module, blocks: list[Block]) -> dict[str, nn.Module]:
    """All modules that hold no block and lie in none."""
    inside = tuple(f"{block.name}." for block in blocks)
    return {
        name: module
        for name, module in model.named_modules()
        if name
        and not f"{name}.".startswith(inside)
        and not any(block.name.startswith(f"{name}.") for block in blocks)
    }


@dataclass
class _Found:
    """What was found so far, by paths from a block on, or in the model."""

    readers: set[str] = field(default_factory=set)
    writers: set[str] = field(default_factory=set)
    vectors: set[str] = field(default_factory=set)
    others: dict[str, int] = field(default_factory=dict)
    norms: set[str] = field(default_factory=set)
    followers: set[str] = field(default_factory=set)

    def add(self, part: "_Found", block: str) -> None:
        """Take in what was found in a block."""

        def path(name: str) -> str:
            return f"{block}.{name}".removeprefix(".")

        for own, other in (
            (self.readers, part.readers),
            (self.writers, part.writers),
            (self.vectors, part.vectors),
            (self.norms, part.norms),
            (self.followers, part.followers),
        ):
            own.update(map(path, other))
        for name, count in part.others.items():
            self.others[path(name)] = count

    def residual(self, width: int) -> Residual:
        return Residual(
            width,
            frozenset(self.readers),
            frozenset(self.writers),
            frozenset(self.vectors),
            dict(self.others),
            frozenset(self.norms),
            frozenset(self.followers),
        )


Poison = Callable[[Edit | None], Seen]
"""Runs a part of the model with one thing changed, or as it is."""


@final
class _Elementwise(TorchFunctionMode):
    """Statistics see no NaN, so that what is done to every channel alike leaves a channel's NaN its own.

    Attributes:
        width: of the stream.
        norms: modules in which a statistic of poisoned channels was taken; an empty path is none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.width = 0
        self.norms: set[str] = set()
        self._inside: list[str] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Know in which of the innermost modules a statistic is taken while the context lasts."""
        handles = []
        for name, module in model.named_modules():
            if not any(True for _ in module.children()):
                handles.append(module.register_forward_pre_hook(self._enter(name)))
                handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Any:
        return lambda *_: self._inside.append(name)

    def _leave(self, *_: object) -> None:
        self._inside.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in STATISTICS and func not in NORMS:
            return func(*args, **kwargs)
        values = args[0] if args else kwargs["input"]
        if not values.is_floating_point() or not bool(values.isnan().any()):
            return func(*args, **kwargs)
        if values.shape[-1] == self.width:
            self.norms.add(self._inside[-1] if self._inside else "")
        clean = values.nan_to_num(nan=0.5)
        out = func(clean, *args[1:], **kwargs) if args else func(**{**kwargs, "input": clean})
        return out + 0 * values if func in NORMS else out


def _traced(run: Poison, width: int) -> dict[str, torch.Tensor]:
    """For every place that can be looked at, which entry of what is poisoned arrives there.

    Args:
        run: with what is poisoned, which has so many entries in its last dimension.

    Returns:
        int64 ``[columns]`` by place: the entry that arrives in a column, -1 for none, -2 for several.
    """
    numbers = torch.arange(width)
    whole = _shown(run(_poisoned(torch.ones(width, dtype=torch.bool))))
    found = {place: torch.where(nan, 0, -1) for place, nan in whole.items()}
    if not any(bool(nan.any()) for nan in whole.values()):
        return found
    several = {place: torch.zeros_like(nan) for place, nan in whole.items()}
    for bit in range(max(1, (width - 1).bit_length())):
        ones = numbers >> bit & 1 == 1
        with_bit, without = _shown(run(_poisoned(ones))), _shown(run(_poisoned(~ones)))
        for place, places in found.items():
            upper, lower = with_bit.get(place), without.get(place)
            if upper is None or lower is None:
                continue
            several[place] |= upper & lower
            places[upper & (places >= 0)] |= 1 << bit
    return {place: torch.where(several[place], -2, places) for place, places in found.items()}


def _poisoned(entries: torch.Tensor) -> Edit:
    """An edit that puts NaN into some entries of the last dimension."""
    return lambda values: values.masked_fill(entries, torch.nan)


def _shown(seen: Seen) -> dict[str, torch.Tensor]:
    """Where NaN arrived, bool ``[columns]`` by place."""
    shown = {name: _columns(rows) for name, rows in seen.inputs.items()}
    for name, values in seen.others.items():
        # A product with several values (a bias that is added) is looked at by the widest.
        widest = max(value.shape[-1] for value in values)
        parts = [_columns(value) for value in values if value.shape[-1] == widest]
        shown[f"{name} "] = torch.stack(parts).any(0)
    for number, output in enumerate(seen.outputs):
        if output.is_floating_point() and output.ndim > 0:
            shown[f"{_LEAVING} {number}"] = _columns(output)
    if seen.entering.numel():
        shown[_ENTERING] = _columns(seen.entering)
    return shown


def _columns(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, values.shape[-1]).isnan().any(0)


def _is_own(places: torch.Tensor) -> bool:
    """Whether every entry arrives in its own column."""
    return bool((places == torch.arange(len(places))).all())


def _is_gate(places: torch.Tensor, size: int) -> bool:
    """Whether every entry arrives in all columns: the weight of a mixture, which multiplies all channels."""
    reached = places[places != -1]
    return size == 1 or bool((reached == -2).all())


def _reached(places: torch.Tensor) -> bool:
    return bool((places != -1).any())


def _entrance(
    responses: Responses,
    elementwise: _Elementwise,
    first: Block,
    modules: Mapping[str, nn.Module],
    width: int,
    found: _Found,
) -> int:
    """What writes the hidden state that enters the first block of a stack; its width.

    Raises:
        PlanError: a writer's features are not the channels in their order.
    """
    before = responses.run(first, _SEQUENCES).entering
    if width not in (0, before.shape[-1]):
        raise PlanError(f"stacks of blocks have hidden sizes of {width} and {before.shape[-1]}", _HINT)
    width = elementwise.width = before.shape[-1]
    elementwise.norms.clear()

    def judge(name: str, run: Poison, size: int, into: set[str]) -> None:
        entering = _traced(run, size).get(_ENTERING)
        if entering is None or not _reached(entering):
            return
        if _is_gate(entering, size):
            return
        if size != width or not _is_own(entering):
            raise _refusal("", f"{name} enters in another order than that of the channels")
        into.add(name)

    for name, module in modules.items():
        if is_linear(module) or isinstance(module, nn.Embedding):
            judge(name, _of_layer(responses, first, name), _width(module), found.writers)
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 1 and parameter.device.type != "meta":
                run = _of_vector(responses, first, module, leaf)
                judge(f"{name}.{leaf}", run, len(parameter), found.vectors)
    if not found.writers:
        raise _refusal("", "nothing outside the blocks was seen to write what enters them")
    found.norms |= elementwise.norms
    return width


def _width(module: nn.Module) -> int:
    return output_features(module) if is_linear(module) else int(module.get_parameter("weight").shape[1])


def _of_layer(responses: Responses, block: Block, path: str) -> Poison:
    return lambda edit: responses.run(block, _SEQUENCES, {} if edit is None else {path: edit})


def _of_vector(responses: Responses, block: Block, module: nn.Module, leaf: str) -> Poison:
    def run(edit: Edit | None) -> Seen:
        kept = module._parameters[leaf]
        if edit is not None and kept is not None:
            module._parameters[leaf] = nn.Parameter(edit(kept.detach()), requires_grad=False)
        try:
            return responses.run(block, _SEQUENCES)
        finally:
            module._parameters[leaf] = kept

    return run


def _refusal(block: str, reason: str) -> PlanError:
    where = f"{block}: " if block else ""
    return PlanError(f"the hidden size cannot be cut: {where}{reason}", _HINT)


@final
class _Search:
    """Readers, writers and norms of one block, or of what follows the last of them."""

    def __init__(
        self,
        responses: Responses,
        elementwise: _Elementwise,
        block: Block,
        modules: Mapping[str, nn.Module],
        width: int,
    ) -> None:
        self._responses, self._elementwise = responses, elementwise
        self._block, self._modules, self._width = block, modules, width

    def run(self) -> _Found:
        """What was found, with paths from the block on.

        Raises:
            PlanError: a channel's way through the part is not its own.
        """
        found = _Found()
        prefix = f"{self._block.name}." if self._block.name else ""
        self._elementwise.norms.clear()
        sinks = self._readers(found)
        found.norms |= self._seen_norms()
        for name, module in self._modules.items():
            if is_linear(module):
                run = _of_layer(self._responses, self._block, f"{prefix}{name}")
                if self._writes(name, run, output_features(module), sinks, found):
                    found.writers.add(name)
                elif not self._block.name and name in found.readers:
                    self._follow(name, run, output_features(module), found)
                continue
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 1 and parameter.device.type != "meta":
                    run = _of_vector(self._responses, self._block, module, leaf)
                    path = f"{name}.{leaf}".removeprefix(".")
                    if self._writes(path, run, len(parameter), sinks, found):
                        found.vectors.add(path)
        for name, size in list(self._responses.widths.items()):
            run = _of_layer(self._responses, self._block, f"{prefix}{name}")
            if self._writes(name, run, size, sinks, found):
                found.others[name] = found.others.get(name, 0) + 1
        return found

    def _seen_norms(self) -> set[str]:
        """Norms of the part that took a statistic of poisoned channels since the last were let go.

        A norm behind another stack is seen from here as well, and found behind the last block.

        Raises:
            PlanError: it is taken in no module of its own.
        """
        if "" in self._elementwise.norms:
            raise self._refusal("a statistic of all channels is taken in no module of its own")
        prefix = f"{self._block.name}." if self._block.name else ""
        return {name.removeprefix(prefix) for name in self._elementwise.norms if name.startswith(prefix)}

    def _readers(self, found: _Found) -> set[str]:
        """Layers and other matrices that read the stream; all places where it can be seen."""

        def run(edit: Edit | None) -> Seen:
            return self._responses.run(self._block, _SEQUENCES, entering=edit)

        sinks: set[str] = set()
        for place, places in _traced(run, self._width).items():
            if place == _ENTERING or not _reached(places):
                continue
            if len(places) != self._width or not _is_own(places):
                raise self._refusal(f"channels arrive in another order in {place.strip()}")
            sinks.add(place)
            if place.endswith(" "):
                found.others[place.strip()] = 1
            elif not place.startswith(_LEAVING):
                found.readers.add(place)
        if self._block.name and f"{_LEAVING} 0" not in sinks:
            raise self._refusal("what enters it does not leave it")
        return sinks

    def _writes(self, name: str, run: Poison, size: int, sinks: set[str], found: _Found) -> bool:
        """Whether entries of something are channels, where the stream can be seen.

        Args:
            found: takes in the norms on the way.

        Raises:
            PlanError: they arrive there in another order.
        """
        self._elementwise.norms.clear()
        arrived = {place: places for place, places in _traced(run, size).items() if place in sinks}
        arrived = {place: places for place, places in arrived.items() if _reached(places)}
        if not arrived:
            return False
        if all(_is_gate(places, size) for places in arrived.values()):
            return False
        for place, places in arrived.items():
            if size != self._width or not _is_own(places):
                raise self._refusal(f"{name} arrives in another order in {place.strip()}")
        found.norms |= self._seen_norms()
        return True

    def _follow(self, name: str, run: Poison, size: int, found: _Found) -> None:
        """Note a layer behind the stream whose features go on one by one, with what reads them."""
        if size != self._width:
            return
        arrived = {place: places for place, places in _traced(run, size).items() if _reached(places)}
        if not all(len(places) == size and _is_own(places) for places in arrived.values()):
            return
        found.followers.add(name)
        linear = (place for place in arrived if place in self._modules and is_linear(self._modules[place]))
        found.followers.update(linear)

    def _refusal(self, reason: str) -> PlanError:
        return _refusal(self._block.name or "behind the last block", reason)
