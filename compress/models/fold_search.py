"""Where a factor can be taken out of a layer's input and put into what produces it, found from the model.

What a layer multiplies with column ``j`` of its weight may be divided by ``s_j`` when the column is
multiplied by it. The division costs nothing where something before the layer can take it: the weight of a
norm, or the rows of another linear layer whose features reach the column by products alone (what a gate
multiplies, what attention averages, what a ReLU lets through). Which those are depends on the architecture,
and no table of names says so here. Each candidate is scaled by random positive factors in a model whose
matrices are sources of random numbers (`compress.models.responses`), in double precision. It is a fold if
every column that changes is multiplied by exactly one of the factors, every column of every layer that
changes is, and nothing else changes: no router, no residual stream.

Features that feed several columns (a value feature shared by the query heads of a group) have one factor. A
norm may add a constant to its stored weight before it multiplies (Gemma multiplies by one plus the weight);
the constant is found by asking for weights of zero and one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import nn

from compress.models.blocks import Block, find_blocks
from compress.models.comparison import TOLERANCE, by_sequence, changed_elsewhere, differ, multiples, paired
from compress.models.folds import Fold, Folds, Reader, Rescaling
from compress.models.load import quiet
from compress.models.probe import is_linear, output_features
from compress.models.responses import TOKENS, Responses, Seen

_TOGETHER = 16
"""Sequences in a run in which one factor holds for all of them."""
_SINGLY_BYTES = 1 << 26
"""Of the widest input when every sequence has a factor of its own."""
_SINGLY_MOST = 128

_SPREAD = 0.7
"""Factors lie between exp(-0.7) and exp(0.7), all different."""


def find_folds(model: Any) -> Folds:
    """Find every fold inside the blocks of a model.

    Blocks that are built alike (the same layers of the same shapes) are probed once. What lies outside the
    blocks is not looked at.

    Args:
        model: a skeleton in float64 with its parameters on the meta device; it is of no other use afterwards.

    Raises:
        ModelError: the model has no stack of blocks, or does not run its blocks in order.
    """
    blocks = find_blocks(model)
    known: dict[object, tuple[list[Fold], dict[str, str]]] = {}
    folds: list[Fold] = []
    unfolded: dict[str, str] = {}
    responses = Responses(model, blocks)
    widest = max((output_features(m) for m in model.modules() if is_linear(m)), default=1)
    singly = max(_TOGETHER, min(_SINGLY_MOST, _SINGLY_BYTES // (8 * TOKENS * widest)))
    for sequences in {_TOGETHER, singly}:
        responses.declare(sequences)
    with quiet(), responses.running():
        for block in blocks:
            responses.prepare(block)
            alike = signature(block.module)
            if alike not in known:
                known[alike] = _Search(responses, block, singly).run()
            found, refused = known[alike]
            folds += [replace(fold, block=block.name) for fold in found]
            unfolded |= {f"{block.name}.{layer}": reason for layer, reason in refused.items()}
            responses.leave(block)
    return Folds(tuple(folds), unfolded)


def norm_folds(responses: Responses, block: Block, modules: Mapping[str, nn.Module]) -> list[Fold]:
    """The folds of some norms, by their paths from the block on.

    Args:
        block: that has been prepared; one with an empty name stands for what lies behind the blocks.
    """
    search = _Search(responses, block, _TOGETHER)
    found = [entry for name, module in modules.items() for entry in search.norms(name, module)]
    return [replace(entry, block=block.name) for entry in found if isinstance(entry, Fold)]


def signature(module: nn.Module) -> object:
    """What blocks that are built alike have in common: the same layers of the same shapes."""
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
    return tuple(type(part) for part in module.modules()), shapes


@final
@dataclass(frozen=True, eq=False)
class _Refused:
    """Why a candidate is no fold, and which layers would have read it."""

    readers: tuple[str, ...]
    reason: str


@final
class _Search:
    """All candidates of one block."""

    def __init__(self, responses: Responses, block: Block, singly: int) -> None:
        self._responses = responses
        self._block = block
        self._singly = singly
        self._dimensions = {name: entry.dim() for name, entry in block.module.named_parameters()}
        self._base = {count: responses.run(block, count) for count in {_TOGETHER, singly}}

    def run(self) -> tuple[list[Fold], dict[str, str]]:
        """Folds with an empty block name, and the layers without one with their reasons."""
        folds: list[Fold] = []
        reasons: dict[str, str] = {}
        taken: set[str] = set()
        for candidate in self._candidates():
            if isinstance(candidate, _Refused):
                for layer in candidate.readers:
                    reasons.setdefault(layer, candidate.reason)
            elif not taken & {reader.layer for reader in candidate.readers}:
                # Where several could scale a layer's input (a gate that is a ReLU, and what it gates), one
                # does.
                taken |= {reader.layer for reader in candidate.readers}
                folds.append(candidate)
        layers = [name for name, module in self._block.module.named_modules() if is_linear(module)]
        # Experts in one parameter are layers too.
        layers += [name for name in self._base[_TOGETHER].products if self._dimensions.get(name) == 3]
        nothing = "nothing in its block scales its input"
        return folds, {name: reasons.get(name, nothing) for name in layers if name not in taken}

    def _candidates(self) -> Iterator[Fold | _Refused]:
        modules = list(self._block.module.named_modules())
        for name, module in modules:
            yield from self.norms(name, module)
        for name, module in modules:
            if is_linear(module):
                yield from self._linear(name, module)

    # -- norms -------------------------------------------------------------------------------------

    def norms(self, name: str, module: nn.Module) -> Iterator[Fold | _Refused]:
        """The fold of one module, where it is a norm."""
        own = dict(module.named_parameters())
        alone = all(child is module for child in module.modules())
        if not own or not alone or any(parameter.dim() != 1 for parameter in own.values()):
            return
        for weight in own:
            found = self._norm_weight(name, module, weight)
            if found is not None:
                yield found
                return

    def _norm_weight(self, name: str, module: nn.Module, weight: str) -> Fold | _Refused | None:
        """The fold of a norm whose parameter ``weight`` multiplies; ``None`` where it does not."""
        kept = {leaf: parameter.detach().clone() for leaf, parameter in module.named_parameters()}
        plain = {leaf: torch.zeros_like(values) for leaf, values in kept.items()}
        try:
            zero = self._with(module, plain)
            one = self._with(module, {**plain, weight: torch.ones_like(kept[weight])})
            # Larger than one: no unmoved value is mistaken for one that was multiplied.
            factors = _factors(len(kept[weight]))
            many = self._with(module, {**plain, weight: factors})
            changed = [layer for layer, rows in zero.inputs.items() if differ(rows, one.inputs[layer])]
            if not changed:
                return None
            offset, channels = self._multiplied(changed, zero, one, many, factors)
            if offset is None:
                return None
            elsewhere = changed_elsewhere(zero, one)
            if elsewhere:
                return _Refused(tuple(changed), f"{name} also feeds {elsewhere}")
            readers = [self._reader(layer, channels[layer]) for layer in zero.inputs if layer in changed]
            offsets = {leaf: offset if leaf == weight else 0.0 for leaf in kept}
            follow = tuple(reader for reader in readers if self._follows(reader))
            lead = tuple(reader for reader in readers if reader not in follow)
            if not lead:
                return None
            rows = torch.arange(len(kept[weight]))
            fold = Fold("", name, "norm", rows, lead, offsets, weight, follow)
            return self._verified(fold, module, kept)
        finally:
            self._set(module, kept)

    def _multiplied(
        self, layers: Sequence[str], zero: Seen, one: Seen, many: Seen, factors: torch.Tensor
    ) -> tuple[float | None, dict[str, torch.Tensor]]:
        """What is added to a weight before it multiplies, and which weight multiplies which column.

        Inputs are ``n (w + c)`` with a normalised ``n``: at weights of zero ``n c``, at one ``n + n c``.
        """
        offsets: list[float] = []
        channels: dict[str, torch.Tensor] = {}
        for layer in layers:
            unit = one.inputs[layer] - zero.inputs[layer]
            norm = float(unit.square().sum())
            offset = float((zero.inputs[layer] * unit).sum()) / norm if norm else float("nan")
            if not abs(offset - round(offset, 4)) < TOLERANCE * 10:
                return None, {}
            offset = round(offset, 4)
            if differ(zero.inputs[layer], unit * offset):
                return None, {}
            found = multiples(unit, many.inputs[layer] - zero.inputs[layer], factors)
            if found is None or bool((found < 0).any()):
                return None, {}
            offsets.append(offset)
            channels[layer] = found
        if not offsets or len(set(offsets)) > 1:
            return None, {}
        return offsets[0], channels

    def _verified(self, fold: Fold, module: nn.Module, kept: Mapping[str, torch.Tensor]) -> Fold | _Refused:
        """The fold, if dividing all parameters of the norm divides its output and nothing else."""
        scales = _factors(len(fold.rows)).flip(0)
        self._set(module, kept)
        before = self._with_products(self._responses.run(self._block, _TOGETHER))
        divided = {
            leaf: Rescaling({0: 1 / scales}, offset).of(kept[leaf]) for leaf, offset in fold.offsets.items()
        }
        after = self._with(module, divided)
        layers = {reader.layer: reader.channels for reader in (*fold.readers, *fold.followers)}
        for layer, rows in before.inputs.items():
            expected = rows / scales[layers[layer]] if layer in layers else rows
            if differ(expected, after.inputs[layer]):
                return _Refused(tuple(layers), f"{fold.producer} does not only multiply what {layer} reads")
        return fold

    def _with(self, module: nn.Module, values: Mapping[str, torch.Tensor]) -> Seen:
        self._set(module, values)
        return self._with_products(self._responses.run(self._block, _TOGETHER))

    def _with_products(self, seen: Seen) -> Seen:
        """The same with routers and experts among the layers, as far as they do nothing but multiply."""
        plain = {
            name: entry
            for name, entry in seen.products.items()
            if entry.dimension is not None and name in self._dimensions
        }
        inputs = {name: torch.cat(entry.inputs) for name, entry in plain.items()}
        others = {name: values for name, values in seen.others.items() if name not in plain}
        return replace(seen, inputs={**seen.inputs, **inputs}, others=others)

    def _reader(self, layer: str, channels: torch.Tensor) -> Reader:
        products = self._base[_TOGETHER].products.get(layer)
        return Reader(layer, channels, None if products is None else products.dimension)

    def _follows(self, reader: Reader) -> bool:
        """Whether it is no layer that would be rounded: a matrix by itself, and not all experts at once."""
        return reader.dimension is not None and self._dimensions[reader.layer] == 2

    def _set(self, module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
        for leaf, tensor in values.items():
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    # -- linear layers -----------------------------------------------------------------------------

    def _linear(self, name: str, module: nn.Module) -> Iterator[Fold | _Refused]:
        features = output_features(module)
        reach: dict[str, dict[int, list[int]]] = {}
        reasons: dict[str, str] = {}
        for part in self._products(name, range(features), features, reasons):
            for layer, reached in part.items():
                for row, columns in reached.items():
                    reach.setdefault(layer, {}).setdefault(row, []).extend(columns)
        if not reach:
            for layer, reason in reasons.items():
                yield _Refused((layer,), reason)
            return
        rows = sorted({row for entries in reach.values() for row in entries})
        place = {row: index for index, row in enumerate(rows)}
        readers: list[Reader] = []
        for layer in self._in_order(reach):
            channels = torch.full((self._base[_TOGETHER].inputs[layer].shape[1],), -1, dtype=torch.long)
            for row, columns in reach[layer].items():
                channels[columns] = place[row]
            if bool((channels < 0).any()):
                missing = int((channels < 0).sum())
                reason = f"{name} scales all but {missing} of its {len(channels)} columns"
                yield _Refused(tuple(reach), reason)
                return
            readers.append(Reader(layer, channels))
        offsets = {leaf: 0.0 for leaf, _ in module.named_parameters(recurse=False)}
        fold = Fold("", name, "linear", torch.tensor(rows), tuple(readers), offsets)
        yield self._linear_verified(fold, features)

    def _linear_verified(self, fold: Fold, features: int) -> Fold | _Refused:
        scales = _factors(len(fold.rows)).flip(0)
        factors = torch.ones(features, dtype=torch.float64)
        factors[fold.rows] = 1 / scales
        before = self._base[_TOGETHER]
        after = self._scaled(fold.producer, factors)
        layers = {reader.layer: reader.channels for reader in fold.readers}
        elsewhere = changed_elsewhere(before, after)
        if elsewhere:
            return _Refused(tuple(layers), f"{fold.producer} also feeds {elsewhere}")
        for layer, rows in before.inputs.items():
            expected = rows / scales[layers[layer]] if layer in layers else rows
            if differ(expected, after.inputs[layer]):
                return _Refused(tuple(layers), f"{fold.producer} reaches {layer} by more than a product")
        return fold

    def _products(
        self, name: str, rows: range, features: int, reasons: dict[str, str]
    ) -> Iterator[dict[str, dict[int, list[int]]]]:
        """Output features that reach columns by products alone: columns by feature by layer.

        All features together are tried first. Where that fails and some of a sample succeed, halves are
        tried, and in the end one feature at a time: a fused layer holds queries and keys beside values.
        """
        together = self._whole(name, rows, features, reasons)
        if together is not None:
            yield together
        elif len(rows) <= self._singly:
            yield self._single(name, list(rows), features)
        else:
            generator = torch.Generator().manual_seed(len(rows))
            sample = (torch.randperm(len(rows), generator=generator)[: self._singly] + rows.start).tolist()
            if self._single(name, sorted(sample), features):
                middle = rows.start + len(rows) // 2
                yield from self._products(name, range(rows.start, middle), features, reasons)
                yield from self._products(name, range(middle, rows.stop), features, reasons)

    def _whole(
        self, name: str, rows: range, features: int, reasons: dict[str, str]
    ) -> dict[str, dict[int, list[int]]] | None:
        """Columns by feature by layer if all these features act by products alone."""
        own = _factors(len(rows))
        factors = torch.ones(features, dtype=torch.float64)
        factors[rows.start : rows.stop] = own
        before = self._base[_TOGETHER]
        after = self._scaled(name, factors)
        changed = [layer for layer, seen in before.inputs.items() if differ(seen, after.inputs[layer])]
        elsewhere = changed_elsewhere(before, after)
        if elsewhere:
            reasons |= dict.fromkeys(changed, f"{name} also feeds {elsewhere}")
            return None
        found: dict[str, dict[int, list[int]]] = {}
        for layer in changed:
            channels = multiples(before.inputs[layer], after.inputs[layer], own)
            if channels is None:
                reasons[layer] = f"{name} reaches it by more than a product"
                return None
            for column, channel in enumerate(channels.tolist()):
                if channel >= 0:
                    found.setdefault(layer, {}).setdefault(rows.start + channel, []).append(column)
        return found

    def _single(self, name: str, rows: list[int], features: int) -> dict[str, dict[int, list[int]]]:
        """The same for each of a few features alone, each in a sequence of its own."""
        factor = 1.75
        factors = torch.ones(self._singly, features, dtype=torch.float64)
        for place, row in enumerate(rows):
            factors[place, row] = factor
        before = self._base[self._singly]
        after = self._scaled(name, factors)
        pure = torch.ones(self._singly, dtype=torch.bool)
        hits: dict[str, torch.Tensor] = {}
        for layer, seen in before.inputs.items():
            old, new = by_sequence(seen, self._singly), by_sequence(after.inputs[layer], self._singly)
            size = TOLERANCE * old.abs().amax(1, keepdim=True)
            moved = ((new - old).abs() > size).any(1)
            multiplied = ((new - old * factor).abs() <= size * factor).all(1)
            pure &= ~(moved & ~multiplied).any(1)
            hits[layer] = moved & multiplied
        others = [*zip(before.outputs, after.outputs, strict=True), *paired(before.others, after.others)]
        for left, right in others:
            if left.shape[0] % self._singly == 0:
                old, new = by_sequence(left, self._singly), by_sequence(right, self._singly)
                pure &= ~((old - new).abs() > TOLERANCE * old.abs().amax()).flatten(1).any(1)
            elif differ(left, right):
                return {}
        found: dict[str, dict[int, list[int]]] = {}
        for place, row in enumerate(rows):
            for layer, hit in hits.items():
                columns = hit[place].nonzero().flatten().tolist()
                if pure[place] and columns:
                    found.setdefault(layer, {})[row] = columns
        return found

    def _scaled(self, name: str, factors: torch.Tensor) -> Seen:
        """What arrives when output features are multiplied, ``[features]`` or ``[sequences, features]``."""

        def edit(values: torch.Tensor) -> torch.Tensor:
            if factors.dim() == 1:
                return values * factors
            parts = values.reshape(factors.shape[0], -1, values.shape[-1])
            return (parts * factors.unsqueeze(1)).reshape(values.shape)

        sequences = _TOGETHER if factors.dim() == 1 else self._singly
        path = f"{self._block.name}.{name}".removeprefix(".")
        return self._responses.run(self._block, sequences, {path: edit})

    def _in_order(self, layers: Sequence[str] | Mapping[str, Any]) -> list[str]:
        """Layers in the order in which the block calls them."""
        return [layer for layer in self._base[_TOGETHER].inputs if layer in layers]


def _factors(count: int) -> torch.Tensor:
    """So many different positive factors in a fixed random order, float64."""
    values = torch.linspace(-_SPREAD, _SPREAD, count, dtype=torch.float64).exp()
    return values[torch.randperm(count, generator=torch.Generator().manual_seed(count))]
