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

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

from torch import nn

from compress.core.errors import PlanError
from compress.models.blocks import Block, find_blocks
from compress.models.fold_search import signature
from compress.models.load import quiet
from compress.models.poison import ENTERING, LEAVING, Elementwise, Poison, is_gate, is_own, reached, traced
from compress.models.probe import input_dimension, is_linear, output_dimension, output_features
from compress.models.responses import Edit, Responses, Seen

_SEQUENCES: Final = 2
_HINT: Final = "leave the hidden size as it is, and prune channels, heads or blocks"


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
    elementwise = Elementwise()
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


def _entrance(
    responses: Responses,
    elementwise: Elementwise,
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
        entering = traced(run, size).get(ENTERING)
        if entering is None or not reached(entering):
            return
        if is_gate(entering, size):
            return
        if size != width or not is_own(entering):
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
        elementwise: Elementwise,
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
        for place, places in traced(run, self._width).items():
            if place == ENTERING or not reached(places):
                continue
            if len(places) != self._width or not is_own(places):
                raise self._refusal(f"channels arrive in another order in {place.strip()}")
            sinks.add(place)
            if place.endswith(" "):
                found.others[place.strip()] = 1
            elif not place.startswith(LEAVING):
                found.readers.add(place)
        if self._block.name and f"{LEAVING} 0" not in sinks:
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
        arrived = {place: places for place, places in traced(run, size).items() if place in sinks}
        arrived = {place: places for place, places in arrived.items() if reached(places)}
        if not arrived:
            return False
        if all(is_gate(places, size) for places in arrived.values()):
            return False
        for place, places in arrived.items():
            if size != self._width or not is_own(places):
                raise self._refusal(f"{name} arrives in another order in {place.strip()}")
        found.norms |= self._seen_norms()
        return True

    def _follow(self, name: str, run: Poison, size: int, found: _Found) -> None:
        """Note a layer behind the stream whose features go on one by one, with what reads them."""
        if size != self._width:
            return
        arrived = {place: places for place, places in traced(run, size).items() if reached(places)}
        if not all(len(places) == size and is_own(places) for places in arrived.values()):
            return
        found.followers.add(name)
        linear = (place for place in arrived if place in self._modules and is_linear(self._modules[place]))
        found.followers.update(linear)

    def _refusal(self, reason: str) -> PlanError:
        return _refusal(self._block.name or "behind the last block", reason)
