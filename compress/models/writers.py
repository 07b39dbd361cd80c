"""The last layer of each block that adds to the hidden state, found from the model itself.

A block hands on what it was given plus what its layers add. Where nothing in the block reads what one of them
added, and it arrives in the hidden state as it is or times a constant, the block's output is linear in the
weights of that layer: what a block should have said can be reached by least squares. Such a layer is found by
adding noise to its output in a model whose matrices are sources of random numbers
(`compress.models.responses`): the same noise must leave the block, and no other layer may notice.

A norm behind the layer (Gemma 2 and 3) or behind the sum (BERT), and fused experts, leave no such layer.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch

from compress.core.errors import PlanError
from compress.models.blocks import Block, find_blocks
from compress.models.fold_search import signature
from compress.models.load import quiet
from compress.models.probe import input_features, is_linear
from compress.models.responses import Responses, Seen

_SEQUENCES: Final = 2
_TOLERANCE: Final = 1e-5
"""Relative to the largest value. Norms compute in single precision whatever comes in."""


@dataclass(frozen=True)
class Writer:
    """A layer whose output is added to the hidden state that its block hands on.

    Attributes:
        layer: its path in the block.
        scale: what its output is multiplied by on the way.
    """

    layer: str
    scale: float


def last_writers(model: Any) -> dict[str, Writer]:
    """The layer that adds to the hidden state without being read in its block, by the path of each block.

    Of several (a block that computes attention and MLP side by side) it is the one with the most inputs.

    Args:
        model: a skeleton in float64 with its parameters on the meta device; it is of no other use afterwards.

    Raises:
        PlanError: a block has no such layer.
    """
    blocks = find_blocks(model)
    responses = Responses(model, blocks)
    responses.declare(_SEQUENCES)
    known: dict[object, Writer] = {}
    found: dict[str, Writer] = {}
    with quiet(), responses.running():
        for block in blocks:
            responses.prepare(block)
            alike = signature(block.module)
            if alike not in known:
                known[alike] = _last_writer(responses, block)
            found[block.name] = known[alike]
            responses.leave(block)
    return found


def _last_writer(responses: Responses, block: Block) -> Writer:
    base = responses.run(block, _SEQUENCES)
    layers = {name: module for name, module in block.module.named_modules() if is_linear(module)}
    found: dict[str, float] = {}
    for name in layers:
        if name in base.inputs:
            scale = _scale(responses, block, name, base)
            if scale is not None:
                found[name] = scale
    if not found:
        raise PlanError(
            f"no linear layer of {block.name} adds to the hidden state as it is, without being read in the "
            "block: there is nothing to repair a cut with",
            "cut without a repair, and distil afterwards",
        )
    # Of several as wide the last one, in the order of the modules.
    chosen = max(enumerate(found), key=lambda entry: (input_features(layers[entry[1]]), entry[0]))[1]
    return Writer(chosen, found[chosen])


def _scale(responses: Responses, block: Block, layer: str, base: Seen) -> float | None:
    """What the output of a layer is multiplied by where it leaves the block; ``None`` where it does not."""
    added: list[torch.Tensor] = []

    def edit(values: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(values.numel())
        noise = torch.randn(values.shape, generator=generator, dtype=values.dtype)
        added.append(noise)
        return values + noise

    after = responses.run(block, _SEQUENCES, {f"{block.name}.{layer}": edit})
    # A layer that is called more than once has no one output.
    if len(added) != 1 or not _same_inputs(base, after):
        return None
    moved = after.outputs[0] - base.outputs[0]
    if moved.numel() != added[0].numel():
        return None
    noise = added[0].reshape(moved.shape)
    scale = float((moved * noise).sum() / noise.square().sum())
    largest = float(base.outputs[0].abs().max())
    near = bool(((moved - scale * noise).abs() <= _TOLERANCE * max(largest, 1.0)).all())
    return scale if near and abs(scale) > _TOLERANCE else None


def _same_inputs(base: Seen, after: Seen) -> bool:
    """Whether all layers and other matrices of a block read what they read before."""
    alone = base.inputs.keys() == after.inputs.keys() and base.others.keys() == after.others.keys()
    return (
        alone
        and all(_same(rows, after.inputs[name]) for name, rows in base.inputs.items())
        and all(_same_lists(values, after.others[name]) for name, values in base.others.items())
    )


def _same_lists(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(_same, left, right))


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape:
        return False
    if left.numel() == 0:
        return True
    size = float(left.abs().max())
    # Written so that NaN differs.
    return bool(((left - right).abs() <= _TOLERANCE * size).all())
