"""Which weights of a block belong to one channel or one head, found from the block itself.

A channel of an MLP is one row of what widens (one of each, where there is a gate) and one column of what
narrows again; a head is some rows of query, key and value and some columns of the output projection.
Which rows and columns those are depends on the architecture: a gate may be fused with what it gates,
query, key and value may be fused head by head or one after the other, several query heads may share a key.
No table of names says so here. Each linear layer is replaced by a source of zeros, one of its output
features is poisoned with NaN, and the columns at which NaN arrives in front of other layers are those that
the feature feeds: a NaN survives every activation, gate, rotation, norm and softmax on its way.

No weight is read and no product is computed, so a block of any width is found out in seconds at plan time.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import nn

from compress.models.blocks import Block, find_blocks
from compress.models.load import quiet
from compress.models.probe import Probe, input_features, is_linear, output_features

Kind = Literal["channels", "heads"]
_Reach = tuple[str, int, tuple[int, ...]]
"""A layer, one of its output features, and the columns of a reader that it reaches."""

_HALVINGS = 2
"""How often a layer is halved in search of parts that feed each column once, before rows are tried singly."""


@dataclass(frozen=True)
class Part:
    """The least that can be taken out: a channel of an MLP, a query head.

    Attributes:
        columns: input columns of the layer that reads it.
        rows: output features by producing layer that feed this part alone.
    """

    columns: tuple[int, ...]
    rows: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Group:
    """Parts that share rows: the query heads of one key-value head.

    Attributes:
        parts: in the order of their columns.
        shared: output features by producing layer that feed several of the parts.
    """

    parts: tuple[Part, ...]
    shared: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Channels:
    """Everything that can be taken out in front of one layer.

    Attributes:
        block: path of the block; layers are named from there on.
        layer: the layer whose input columns they are.
        kind: channels of an MLP, or heads.
        groups: all alike, in the order of their columns; the same objects for all blocks that are alike.
    """

    block: str
    layer: str
    kind: Kind
    groups: tuple[Group, ...]

    @property
    def reader(self) -> str:
        """The layer whose input columns they are, by its path in the model."""
        return f"{self.block}.{self.layer}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, parts in a group, columns in a part."""
        first = self.groups[0]
        return len(self.groups), len(first.parts), len(first.parts[0].columns)

    @property
    def producers(self) -> tuple[str, ...]:
        """Layers that feed the reader, named from the block on, sorted."""
        found = {
            name for group in self.groups for part in (group.shared, group.parts[0].rows) for name in part
        }
        return tuple(sorted(found))


@dataclass(frozen=True)
class Held:
    """A layer in the middle of a block whose inputs cannot be taken out, with the reason."""

    reader: str
    reason: str


@dataclass(frozen=True)
class Anatomy:
    """What was found in all blocks of a model."""

    channels: tuple[Channels, ...]
    held: tuple[Held, ...]


def dissect(model: Any) -> Anatomy:
    """Find the channels and heads of every block.

    Blocks that are built alike (the same layers of the same shapes) are probed once.

    Args:
        model: a skeleton with its parameters on the meta device; it is of no other use afterwards.

    Raises:
        ModelError: the model has no stack of blocks, or does not run its blocks in order.
    """
    if hasattr(model, "set_attn_implementation"):
        # Fused kernels need not carry a NaN through their softmax; plain arithmetic does.
        model.set_attn_implementation("eager")
    blocks = find_blocks(model)
    known: dict[object, tuple[list[Channels], list[Held]]] = {}
    channels: list[Channels] = []
    held: list[Held] = []
    probe = Probe(model, blocks)
    with quiet(), probe.running():
        for block in blocks:
            signature = _signature(block.module)
            if signature not in known:
                known[signature] = _dissect_block(probe, block)
            found, fixed = known[signature]
            channels += [replace(entry, block=block.name) for entry in found]
            held += [Held(f"{block.name}.{entry.reader}", entry.reason) for entry in fixed]
            probe.advance(block)
    return Anatomy(tuple(channels), tuple(held))


def _signature(module: nn.Module) -> object:
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
    return type(module), shapes


def _dissect_block(probe: Probe, block: Block) -> tuple[list[Channels], list[Held]]:
    layers = {name: module for name, module in block.module.named_modules() if is_linear(module)}
    outer = probe.readers_of_the_input(block)
    inner = {name: input_features(module) for name, module in layers.items() if name not in outer}
    fed: dict[str, list[_Reach]] = {name: [] for name in inner}
    held: dict[str, str] = {}
    for name, module in layers.items():
        reach = probe.reach(block, name, [range(output_features(module))])
        readers = [reader for reader in inner if bool(reach[reader].any())]
        if probe.reached_output or any(bool(reach[reader].any()) for reader in outer):
            held |= dict.fromkeys(readers, f"{name} also feeds what lies beyond it")
            continue
        for row, reader, columns in _Rows(probe, block, name, readers).all(range(output_features(module))):
            fed[reader].append((name, row, columns))
    channels: list[Channels] = []
    for reader, entries in fed.items():
        reason = held.get(reader) or _fed_twice(reader, fed)
        found = reason or _grouped(reader, inner[reader], entries)
        if isinstance(found, Channels):
            channels.append(found)
        else:
            held[reader] = found
    return channels, [Held(reader, reason) for reader, reason in held.items()]


def _fed_twice(reader: str, fed: Mapping[str, Sequence[_Reach]]) -> str:
    """Why the columns of a reader belong to another one as well; empty where they do not."""
    own = {(name, row) for name, row, _ in fed[reader]}
    for other, entries in fed.items():
        if other != reader and any((name, row) in own for name, row, _ in entries):
            return f"what feeds it also feeds {other}"
    return ""


def _grouped(reader: str, width: int, entries: Sequence[_Reach]) -> Channels | str:
    """Groups and parts from which row reaches which columns; or why there are none."""
    component = _components(width, [columns for _, _, columns in entries])
    reached = {column for _, _, columns in entries for column in columns}
    if len(reached) < width:
        return f"{width - len(reached)} of its {width} columns come from no linear layer of the block"
    members: dict[int, list[int]] = {}
    for column in range(width):
        members.setdefault(component[column], []).append(column)
    rows: dict[int, list[_Reach]] = {root: [] for root in members}
    for entry in entries:
        rows[component[entry[2][0]]].append(entry)
    groups = tuple(_group(tuple(columns), rows[root]) for root, columns in members.items())
    if (
        len({_size(part) for group in groups for part in group.parts}) > 1
        or len(set(map(_outline, groups))) > 1
    ):
        return "its heads differ in size"
    if len(groups) == 1 and len(groups[0].parts) == 1:
        return "all its columns depend on one another"
    kind: Kind = "channels" if len(groups) == width else "heads"
    return Channels("", reader, kind, groups)


def _group(columns: tuple[int, ...], entries: Sequence[_Reach]) -> Group:
    """The parts of connected columns.

    Query features reach exactly the columns of their head, and there are several of them; a value feature
    reaches one column of each head. So parts are the proper subsets that several rows reach in common.
    """
    counted: dict[tuple[int, ...], int] = {}
    for _, _, reached in entries:
        counted[reached] = counted.get(reached, 0) + 1
    proper = sorted(reached for reached, count in counted.items() if count > 1 and reached != columns)
    flat = [column for reached in proper for column in reached]
    divided = (
        len(proper) > 1 and sorted(flat) == list(columns) and len({len(reached) for reached in proper}) == 1
    )
    sets = proper if divided else [columns]
    owner = {column: place for place, reached in enumerate(sets) for column in reached}
    own: list[dict[str, list[int]]] = [{} for _ in sets]
    shared: dict[str, list[int]] = {}
    for name, row, reached in entries:
        places = {owner[column] for column in reached}
        target = own[places.pop()] if len(places) == 1 else shared
        target.setdefault(name, []).append(row)
    parts = tuple(Part(reached, _fixed(rows)) for reached, rows in zip(sets, own, strict=True))
    return Group(parts, _fixed(shared))


def _outline(group: Group) -> object:
    """What must be the same for all groups, so that any of them may go."""
    return len(group.parts), tuple(sorted((name, len(rows)) for name, rows in group.shared.items()))


def _size(part: Part) -> object:
    """What must be the same for all parts, so that any of them may go."""
    return len(part.columns), tuple(sorted((name, len(rows)) for name, rows in part.rows.items()))


def _fixed(rows: Mapping[str, list[int]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(sorted(entries)) for name, entries in rows.items()}


def _components(width: int, sets: Iterable[tuple[int, ...]]) -> list[int]:
    """For each column the smallest one that it is connected to by sets that overlap."""
    parent = list(range(width))

    def root(column: int) -> int:
        while parent[column] != column:
            parent[column] = parent[parent[column]]
            column = parent[column]
        return column

    for columns in set(sets):
        roots = sorted({root(column) for column in columns})
        for other in roots[1:]:
            parent[other] = roots[0]
    return [root(column) for column in range(width)]


@final
class _Rows:
    """The columns that each output feature of one layer reaches.

    Where no column is fed by more than one of the features, each is told by the bits of its number: one
    set of features with the bit and one without it for every bit. Where columns are fed by several (a gate
    fused with what it gates), halves of the layer are tried, and in the end feature by feature.
    """

    def __init__(self, probe: Probe, block: Block, layer: str, readers: Sequence[str]) -> None:
        self._probe = probe
        self._block = block
        self._layer = layer
        self._readers = readers

    def all(self, rows: range, halvings: int = _HALVINGS) -> Iterator[tuple[int, str, tuple[int, ...]]]:
        """Row, reader and columns, for every row that reaches anything."""
        decoded = self._decoded(rows)
        if decoded is not None:
            yield from decoded
        elif halvings > 0 and len(rows) > 1:
            middle = rows.start + len(rows) // 2
            yield from self.all(range(rows.start, middle), halvings - 1)
            yield from self.all(range(middle, rows.stop), halvings - 1)
        else:
            reach = self._probe.reach(self._block, self._layer, [[row] for row in rows])
            for reader in self._readers:
                for place, columns in enumerate(reach[reader]):
                    if bool(columns.any()):
                        yield rows[place], reader, tuple(columns.nonzero().flatten().tolist())

    def _decoded(self, rows: range) -> list[tuple[int, str, tuple[int, ...]]] | None:
        """The same where every column is fed by at most one of these rows; ``None`` where it is not."""
        bits = range(max(1, (len(rows) - 1).bit_length()))
        sets = [
            [row for row in rows if (row - rows.start) >> bit & 1 == value]
            for bit in bits
            for value in (0, 1)
        ]
        reach = self._probe.reach(self._block, self._layer, sets)
        found: list[tuple[int, str, tuple[int, ...]]] = []
        for reader in self._readers:
            hits = reach[reader].view(len(bits), 2, -1)
            if bool((hits[:, 0] & hits[:, 1]).any()):
                return None
            places = (hits[:, 1].long() << torch.arange(len(bits)).unsqueeze(1)).sum(0)
            columns_of: dict[int, list[int]] = {}
            for column in (hits[0, 0] | hits[0, 1]).nonzero().flatten().tolist():
                columns_of.setdefault(int(places[column]), []).append(column)
            found += [(rows[place], reader, tuple(columns)) for place, columns in sorted(columns_of.items())]
        return found
