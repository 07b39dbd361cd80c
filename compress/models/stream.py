"""The residual stream of a model: which layers read it and which write it, found from the model itself.

Every block adds what it computes to the hidden state that it was given. If all that is added is rotated by
one orthogonal matrix, and everything that reads the sum undoes the rotation, the model computes the same.
Which
layers those are is asked of a model whose matrices are sources of random numbers
(`compress.models.responses`):

- a *writer* is a layer or an embedding whose output arrives in the stream as it is, or times a constant;
- a *reader* is a layer whose input moves with the stream;
- a *norm* between them may multiply and add; both go into its readers, so that it only normalises.

Then all writers and what enters are rotated at once. What every reader sees and what leaves must be rotated,
and nothing else may change. So a norm behind a layer (Gemma 2 and 3), a norm behind the sum (BERT), a router
or fused experts are refused with the reason, whatever they are called.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import nn

from compress.core.errors import PlanError
from compress.models.blocks import Block, find_blocks
from compress.models.fold_search import norm_folds, signature
from compress.models.folds import Fold
from compress.models.load import quiet
from compress.models.probe import input_features, is_linear, output_features
from compress.models.responses import Edit, Responses, Seen
from compress.numerics.rotation import rotation

_SEQUENCES = 16
_TOLERANCE = 1e-5
"""Relative to the largest value. Norms compute in single precision whatever comes in."""
_SEED = 20
_HINT = "use transform.awq or transform.smoothquant, which scale single channels"


@dataclass(frozen=True)
class Stream:
    """Who reads and writes the residual stream.

    Attributes:
        width: of the hidden state.
        keeps_mean: whether a norm takes the mean of all channels away, so that only rotations that keep the
            vector of ones may be used.
        writers: linear layers and embeddings by their paths in the model.
        readers: linear layers by their paths in the model.
        norms: between the stream and readers; the readers are all that they feed.
        scales: what the output of each writer is multiplied by on its way into the stream.
    """

    width: int
    keeps_mean: bool
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    norms: tuple[Fold, ...]
    scales: Mapping[str, float]


def find_stream(model: Any) -> Stream:
    """Find the residual stream of a model with one stack of blocks.

    Args:
        model: a skeleton in float64 with its parameters on the meta device; it is of no other use afterwards.

    Raises:
        PlanError: the stream cannot be rotated, with the reason.
    """
    blocks = find_blocks(model)
    stacks = list(dict.fromkeys(block.name.rpartition(".")[0] for block in blocks))
    if len(stacks) > 1:
        raise PlanError(
            f"a residual stream is searched in one stack of blocks, and this model has {len(stacks)}: "
            f"{stacks[1]} reads what {stacks[0]} hands on, so one rotation would have to serve both",
            _HINT,
        )
    responses = Responses(model, blocks)
    responses.declare(_SEQUENCES)
    known: dict[object, _Part] = {}
    parts: list[_Part] = []
    outer = _outside(model, blocks)
    with quiet(), responses.running():
        for block in blocks:
            responses.prepare(block)
            if block.position == 0:
                writers, width = _entrance(responses, block, outer)
                parts.append(_Part(writers, (), (), True))
            alike = signature(block.module)
            if alike not in known:
                modules = dict(block.module.named_modules())
                known[alike] = _Search(responses, block, modules, width).run()
            parts.append(known[alike].at(block.name))
            responses.leave(block)
        exit_ = Block("", model, blocks[-1].stack, len(blocks))
        parts.append(_Search(responses, exit_, outer, width).run().at(""))
    return Stream(
        width,
        not all(part.turns_freely for part in parts),
        tuple(name for part in parts for name in part.writers),
        tuple(name for part in parts for name in part.readers),
        tuple(norm for part in parts for norm in part.norms),
        {name: scale for part in parts for name, scale in part.writers.items()},
    )


@dataclass(frozen=True)
class _Part:
    """What was found in one block, or outside them; paths from the block on.

    Attributes:
        writers: with what their output is multiplied by on its way.
        turns_freely: whether any rotation will do.
    """

    writers: Mapping[str, float]
    readers: tuple[str, ...]
    norms: tuple[Fold, ...]
    turns_freely: bool

    def at(self, block: str) -> "_Part":
        """The same in another block of the same build, with paths in the model."""

        def path(name: str) -> str:
            return f"{block}.{name}".removeprefix(".")

        return _Part(
            {path(name): scale for name, scale in self.writers.items()},
            tuple(map(path, self.readers)),
            tuple(replace(norm, block=block) for norm in self.norms),
            self.turns_freely,
        )


def _outside(model: nn.Module, blocks: list[Block]) -> dict[str, nn.Module]:
    """All modules that hold no block and lie in none."""
    inside = tuple(f"{block.name}." for block in blocks)
    return {
        name: module
        for name, module in model.named_modules()
        if not f"{name}.".startswith(inside)
        and not any(block.name.startswith(f"{name}.") for block in blocks)
        and name
    }


def _entrance(
    responses: Responses, first: Block, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, float], int]:
    """What writes the hidden state that enters the first block, each with its factor, and its width."""
    before = responses.run(first, _SEQUENCES).entering
    width = before.shape[-1]
    writers: dict[str, float] = {}
    for name, module in modules.items():
        if not (is_linear(module) or isinstance(module, nn.Embedding)):
            continue
        after = responses.run(first, _SEQUENCES, {name: _doubled}).entering
        if _same(before, after):
            continue
        moved = responses.run(first, _SEQUENCES, {name: _shifted}).entering - before
        constant = float(moved.flatten()[0])
        wide = _width(module) == width
        if not wide or constant == 0 or not _same(moved, torch.full_like(moved, constant)):
            raise PlanError(f"{name} enters the residual stream through more than a sum", _HINT)
        writers[name] = constant
    if not writers:
        raise PlanError("nothing outside the blocks was seen to write the residual stream", _HINT)
    turn = rotation(width, _SEED)
    turned = responses.run(first, _SEQUENCES, dict.fromkeys(writers, _turning(turn))).entering
    if not _same(turned, before @ turn):
        raise PlanError("what enters the first block is more than the sum of what writes it", _HINT)
    return writers, width


def _width(module: nn.Module) -> int:
    return output_features(module) if is_linear(module) else int(module.get_parameter("weight").shape[1])


@final
class _Search:
    """Readers, writers and norms of one block, or of what follows the last of them."""

    def __init__(
        self, responses: Responses, block: Block, modules: Mapping[str, nn.Module], width: int
    ) -> None:
        self._responses = responses
        self._block = block
        self._modules = modules
        self._width = width
        self._base = self._run()

    def run(self) -> _Part:
        """What was found, with paths from the block on.

        Raises:
            PlanError: the part does not turn with its input.
        """
        linear = [name for name, module in self._modules.items() if is_linear(module)]
        moved = self._run(entering=lambda values: values + _noise(values))
        readers = [name for name in linear if name in self._base.inputs and self._moves(name, moved)]
        self._refuse_others(moved)
        for name in readers:
            if input_features(self._modules[name]) != self._width:
                raise self._refusal(f"{name} reads something else that moves with the residual stream")
        scales = {name: self._written(name) for name in linear}
        writers = {name: scale for name, scale in scales.items() if scale != 0}
        norms = self._norms(readers)
        with self._plain(norms):
            self._base = self._run()
            free = self._turns(rotation(self._width, _SEED), readers, [*writers])
            if not free and not self._turns(
                rotation(self._width, _SEED, keeps_mean=True), readers, [*writers]
            ):
                raise self._refusal("it does not turn with the residual stream")
        return _Part(writers, tuple(readers), tuple(norms), free)

    def _run(self, edits: Mapping[str, Edit] | None = None, entering: Edit | None = None) -> Seen:
        paths = {f"{self._block.name}.{name}".removeprefix("."): edit for name, edit in (edits or {}).items()}
        return self._responses.run(self._block, _SEQUENCES, paths, entering)

    def _refusal(self, reason: str) -> PlanError:
        where = self._block.name or "behind the last block"
        return PlanError(f"the residual stream cannot be rotated: {where}: {reason}", _HINT)

    def _moves(self, name: str, other: Seen) -> bool:
        return not _same(self._base.inputs[name], other.inputs[name])

    def _refuse_others(self, moved: Seen) -> None:
        for name, values in self._base.others.items():
            after = moved.others.get(name, [])
            if len(values) != len(after) or not all(map(_same, values, after)):
                raise self._refusal(f"{name} reads it and is no linear layer")

    def _written(self, name: str) -> float:
        """What a layer's output is multiplied by where it is added to what leaves; 0 where it is not.

        Raises:
            PlanError: what leaves depends on it in another way.
        """
        if not self._block.name:
            # Behind the blocks the stream has ended.
            return 0.0
        before, after = self._base.outputs[0], self._run({name: _doubled}).outputs[0]
        if _same(before, after):
            return 0.0
        moved = self._run({name: _shifted}).outputs[0] - before
        constant = float(moved.flatten()[0])
        if constant == 0 or not _same(moved, torch.full_like(moved, constant)):
            raise self._refusal(f"{name} reaches it through more than a sum")
        return constant

    def _norms(self, readers: list[str]) -> list[Fold]:
        """Norms whose only readers are those of the stream."""
        found = norm_folds(self._responses, self._block, self._modules)
        return [
            fold
            for fold in found
            if not fold.followers and {reader.layer for reader in fold.readers} <= set(readers)
        ]

    def _plain(self, norms: list[Fold]) -> "_Plain":
        return _Plain({norm: self._modules[norm.producer] for norm in norms})

    def _turns(self, turn: torch.Tensor, readers: list[str], writers: list[str]) -> bool:
        """Whether readers and what leaves turn with what enters and is written, and nothing else does."""
        after = self._run(dict.fromkeys(writers, _turning(turn)), _turning(turn))
        for name, rows in self._base.inputs.items():
            expected = rows @ turn if name in readers else rows
            if not _same(expected, after.inputs[name]):
                return False
        if not self._block.name:
            return all(map(_same, self._base.outputs, after.outputs))
        first, *rest = self._base.outputs
        return _same(first @ turn, after.outputs[0]) and all(map(_same, rest, after.outputs[1:]))


@final
class _Plain:
    """Norms that only normalise while the context lasts."""

    def __init__(self, norms: Mapping[Fold, nn.Module]) -> None:
        self._norms = norms
        self._kept: list[tuple[nn.Module, str, nn.Parameter]] = []

    def __enter__(self) -> None:
        for fold, module in self._norms.items():
            for leaf, value in plain_values(fold).items():
                parameter = module.get_parameter(leaf)
                self._kept.append((module, leaf, parameter))
                module._parameters[leaf] = nn.Parameter(
                    torch.full_like(parameter, value), requires_grad=False
                )

    def __exit__(self, *_: object) -> None:
        for module, leaf, parameter in self._kept:
            module._parameters[leaf] = parameter


def plain_values(norm: Fold) -> dict[str, float]:
    """What the parameters of a norm are when it multiplies by one and adds nothing."""
    return {leaf: 1.0 - norm.offsets[leaf] if leaf == norm.weight else 0.0 for leaf in norm.offsets}


def _turning(turn: torch.Tensor) -> Edit:
    return lambda values: values @ turn


def _doubled(values: torch.Tensor) -> torch.Tensor:
    return values + _noise(values)


def _shifted(values: torch.Tensor) -> torch.Tensor:
    return values + 1


def _noise(values: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(values.numel())
    return torch.randn(values.shape, generator=generator, dtype=values.dtype)


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape:
        return False
    if left.numel() == 0:
        return True
    size = max(float(left.abs().max()), float(right.abs().max()))
    # Written so that NaN differs.
    return bool(((left - right).abs() <= _TOLERANCE * size).all())
