"""Making up for blocks that are gone: the last layer that adds to the hidden state is fitted again.

Behind a gap the next block sees the hidden state from before the gap. The block in front of it can hand on a
better one: what the original model has behind the gap is regressed on the inputs of the layer that adds last
(`compress.models.writers`), on the hidden states that the shortened model really has, and the layer is
changed by the result (a linear map is fitted and merged so in Shopkhoev et al. 2025, "ReplaceMe",
arXiv 2505.02819, section 3; here the layer itself is free, and held near its own weights by a ridge). Every
block behind the first gap is fitted in the same way, so that what is still wrong does not add up.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compress.core.artifact import Artifact
from compress.core.errors import CalibrationError, ModelError, PlanError
from compress.core.run import Run
from compress.models.blocks import Block, Reentry, hidden_state
from compress.models.checkpoint import Checkpoint
from compress.models.load import skeleton
from compress.models.probe import input_dimension, input_features, output_features
from compress.models.writers import Writer, last_writers
from compress.numerics.least_squares import Moments
from compress.sweep.activations import Activations
from compress.sweep.walk import Walk


@dataclass(frozen=True)
class Refitted:
    """New values of a block's last layer.

    Attributes:
        tensors: by the names of its parameters in the model, in the precision that they have on disk.
        errors: relative Frobenius distance of each to what it was.
        row: what the table of layers says of it.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    row: Mapping[str, Any] = field(default_factory=dict)


def writers_of(source: Artifact, run: Run, checkpoint: Checkpoint) -> dict[str, Writer]:
    """The layer of each block that a repair fits again, by the path of the block.

    Args:
        checkpoint: of the source.

    Raises:
        PlanError: a block has no such layer, or its weights are converted while transformers loads them.
    """
    model = skeleton(source, task=run.task, dtype=torch.float64, trust_remote_code=run.trust_remote_code)
    shapes = {name: tuple(entry.shape) for name, entry in model.named_parameters()}
    found = last_writers(model)
    for block, writer in found.items():
        for leaf in ("weight", "bias"):
            name = f"{block}.{writer.layer}.{leaf}"
            if name not in shapes:
                continue
            files = _on_disk(checkpoint, name)
            if len(files) != 1 or checkpoint.shape(files[0]) != shapes[name]:
                raise PlanError(
                    f"{name} is converted while transformers loads it, so it cannot be repaired on disk",
                    "save the model with a current transformers first, or cut without a repair",
                )
    return found


def refit(walk: Walk, block: Block, writer: Writer, activations: Activations, reentry: Reentry) -> Refitted:
    """Fit the last layer of a block so that what it hands on comes near to the original model's hidden state.

    The layer in memory gets the new values, as a loader will see them.

    Args:
        block: in memory, behind the recordings of the shortened model.
        activations: the recordings of the original model lie where this block's output should be.

    Raises:
        CalibrationError: hidden states are not finite, or the least squares cannot be solved.
        ModelError: a new value is beyond the precision in which it is written.
    """
    path = f"{block.name}.{writer.layer}"
    layer = walk.model.get_submodule(path)
    bias = getattr(layer, "bias", None) is not None
    moments = Moments(input_features(layer), output_features(layer), intercept=bias, device=walk.device)
    for batch, recording, original in zip(
        activations.batches, activations.recordings, activations.original, strict=True
    ):
        with _arriving(layer) as inputs:
            said = hidden_state(reentry.run(block.position, batch, recording)).float()
        wanted = original.hidden[block.stack].to(walk.device).float()
        lost = (wanted - said) / writer.scale
        moments.add(inputs[0], lost.flatten(0, -2), wanted.flatten(0, -2))
    try:
        correction = moments.correction()
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error.message}", error.hint) from error
    change = correction.change.T if input_dimension(layer) == 0 else correction.change
    tensors: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    changes = [("weight", change)]
    if correction.shift is not None:
        changes.append(("bias", correction.shift))
    for leaf, added in changes:
        name = f"{path}.{leaf}"
        tensors[name], errors[name] = _changed(walk, name, added)
        with torch.no_grad():
            layer.get_parameter(leaf).copy_(tensors[name])
    row = {
        "repaired": writer.layer,
        "rows": moments.targets,
        "columns": moments.columns,
        "repaired_tokens": moments.tokens,
        "error": f"{_relative(correction.before, writer):.6g}",
        "repaired_error": f"{_relative(correction.after, writer):.6g}",
    }
    return Refitted(tensors, errors, row)


def _relative(square: float, writer: Writer) -> float:
    """The distance to the target in units of its length, from the mean square before the layer's factor."""
    return math.sqrt(square) * abs(writer.scale)


def _changed(walk: Walk, name: str, added: torch.Tensor) -> tuple[torch.Tensor, float]:
    """A parameter with something added, as it will lie on disk, and how far it moved."""
    (file,) = _on_disk(walk.checkpoint, name)
    before = walk.checkpoint.tensor(file)
    changed = (before.double() + added.to("cpu")).to(before.dtype)
    if not bool(torch.isfinite(changed).all()):
        raise ModelError(
            f"{name} would leave the range of {changed.dtype}", "convert the model to bfloat16 first"
        )
    size = float(torch.linalg.vector_norm(before.double()))
    moved = float(torch.linalg.vector_norm(changed.double() - before.double()))
    return changed, moved / size if size else moved


def _on_disk(checkpoint: Checkpoint, parameter: str) -> list[str]:
    return [name for name in checkpoint.names if checkpoint.target[name] == parameter]


@contextmanager
def _arriving(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What a layer reads while the context lasts, ``[tokens, columns]`` of one call."""
    inputs: list[torch.Tensor] = []

    def watch(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0].detach().flatten(0, -2))

    hook = layer.register_forward_pre_hook(watch)
    try:
        yield inputs
    finally:
        hook.remove()
