"""From a GPTQ checkpoint, ours or another tool's, to compressed-tensors: the same integers, laid out anew.

What stands between the two is read from configuration, headers and the indices of groups before anything is
written: an activation order has no place in the other format. Some writers give every layer a bias of zeros
that the architecture does not have; it changes nothing, and stays behind.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from compress.conversion.packed import (
    Layer,
    Rewriting,
    Rewritten,
    Survey,
    carry,
    needs,
    size_of,
)
from compress.core.errors import PlanError
from compress.core.passes import Needs, Outcome

if TYPE_CHECKING:
    import torch

    from compress.core.artifact import Artifact
    from compress.core.run import Run
    from compress.formats.packed import Inexact, Layout
    from compress.models.checkpoint import Checkpoint
    from compress.numerics.affine import Quantized

CONFIG_FILE: Final = "quantize_config.json"
"""Says once more, beside the weights, what ``config.json`` says of a GPTQ checkpoint."""
_LOCALS: Final = ("qweight", "qzeros", "scales", "g_idx")


def survey(source: "Artifact", run: "Run") -> Survey:
    """Look a GPTQ checkpoint over; of its tensors only indices of groups and stray biases are read.

    Raises:
        ModelError: it is damaged.
        PlanError: a layer is stored in a way that has no place elsewhere; or transformers does not know it.
    """
    from torch import nn

    from compress.formats.gptq import read_matrix
    from compress.models.checkpoint import Checkpoint
    from compress.models.load import skeleton

    config: Mapping[str, Any] = source.config["quantization_config"]
    model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
    checkpoint = Checkpoint(source, model)
    known = set(checkpoint.names)
    stems = [name.removesuffix(".qweight") for name in checkpoint.names if name.endswith(".qweight")]
    layers = tuple(_layer(stem, known, model, checkpoint, config) for stem in stems)
    packed = {layer.module for layer in layers}
    kept = tuple(
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in packed
    )
    read = partial(_read, read_matrix, config)
    return Survey(source, model, checkpoint, layers, kept, read, _stray(layers, model, checkpoint))


def _read(
    read_matrix: Any, config: Mapping[str, Any], tensors: "Mapping[str, torch.Tensor]", stem: str
) -> "Quantized":
    matrix: Quantized = read_matrix(tensors, stem, config)
    return matrix


def _layer(
    stem: str, known: set[str], model: Any, checkpoint: "Checkpoint", config: Mapping[str, Any]
) -> Layer:
    import torch

    from compress.core.errors import ModelError
    from compress.formats.gptq import scheme_of
    from compress.models.integers import module_of

    names = {local: f"{stem}.{local}" for local in _LOCALS if f"{stem}.{local}" in known}
    lost = sorted({"qweight", "qzeros", "scales"} - set(names))
    if lost:
        raise ModelError(f"'{stem}' lacks {lost[0]}", "is the download complete?")
    headers = {
        local: checkpoint.tensor(name)
        if local == "g_idx"
        else torch.empty(checkpoint.shape(name), dtype=checkpoint.dtype(name), device="meta")
        for local, name in names.items()
    }
    scheme, shape = scheme_of(headers, stem, config)
    module = module_of(model, checkpoint, stem)
    kind = "expert" if module is None else type(model.get_submodule(module)).__name__
    return Layer(stem, module or stem, kind, module is None, names, scheme, *shape)


def _stray(layers: tuple[Layer, ...], model: Any, checkpoint: "Checkpoint") -> frozenset[str]:
    """Biases of zeros that the architecture has no place for.

    Raises:
        PlanError: it has no place for one that is not zero.
    """
    places = set(model.state_dict())
    stray = set()
    for layer in layers:
        name = f"{layer.stem}.bias"
        if name not in checkpoint.target or checkpoint.target[name] in places:
            continue
        if bool(checkpoint.tensor(name).any()):
            raise PlanError(
                f"'{name}' is not zero, and {type(model).__name__} has no place for it",
                "do config.json and the weight files belong together? is the task right (--task)?",
            )
        stray.add(name)
    return frozenset(stray)


def check(found: Survey) -> Needs:
    """Refuse what compressed-tensors cannot hold, and predict the work.

    Raises:
        PlanError: naming the first layer that cannot be held.
    """
    from compress.formats.compressed_tensors import CompressedTensors

    form = CompressedTensors()
    held = [layer.held() for layer in found.layers]
    for layer, entry in zip(found.layers, held, strict=True):
        reason = form.refusal(entry)
        if reason is not None:
            raise PlanError(f"{layer.stem}: {reason}", "keep the GPTQ checkpoint for engines that read it")
    together = form.refusal_together(held)
    if together is not None:
        raise PlanError(
            f"{found.source.path}: {together}", "keep the GPTQ checkpoint for engines that read it"
        )
    scale_bytes = _storage(found).itemsize
    packed = sum(form.encoded_bytes(entry, scale_bytes) for entry in held)
    return needs(found, packed + sum(size_of(found, name) for name in found.floats))


def configuration(found: Survey) -> dict[str, Any]:
    """``config.json`` as a loader of compressed-tensors needs it."""
    from compress.formats.compressed_tensors import CompressedTensors

    bare = {key: value for key, value in found.source.config.items() if key != "quantization_config"}
    return CompressedTensors().configuration([layer.held() for layer in found.layers], found.kept, bare)


def apply(found: Survey, config: Mapping[str, Any], target: Path, run: "Run", inexact: "Inexact") -> Outcome:
    """Write the model as compressed-tensors.

    Args:
        found: the checkpoint.
        config: to write.
        target: where.
        run: who is told.
        inexact: whether a scale that the model's own precision does not hold is refused or rounded.

    Raises:
        PlanError: a number that has no place in the other format, with the layer's name.
    """
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    storage = _storage(found)
    rewriting = Rewriting(
        found, run, "compressed-tensors", partial(_layout, storage), partial(_rewritten, storage, inexact)
    )
    rewriting.write(target)
    carry(found.source, target, but=CONFIG_FILE)
    decisions = {
        "format": "compressed-tensors",
        "matrices": len(found.layers),
        "schemes": sorted({str(layer.scheme) for layer in found.layers}),
        "kept": list(found.kept),
        "left_out": sorted(found.left_out),
        "largest_scale_change": rewriting.shift,
    }
    return Outcome(decisions, dict(sorted(rewriting.meant.items())))


def _storage(found: Survey) -> "torch.dtype":
    """The precision of scales: that in which a loader holds the model."""
    from compress.models.load import loaded_dtype

    return loaded_dtype(found.source)


def _layout(storage: "torch.dtype", layer: Layer) -> "Layout":
    import torch

    scheme, rows, groups = layer.scheme, layer.rows, layer.scheme.groups(layer.columns)
    layout: Layout = {
        "weight_packed": (torch.int32, (rows, -(-layer.columns * scheme.bits // 32))),
        "weight_scale": (storage, (rows, groups)),
        "weight_shape": (torch.int64, (2,)),
    }
    if not scheme.symmetric:
        layout["weight_zero_point"] = (torch.int32, (-(-rows * scheme.bits // 32), groups))
    return layout


def _rewritten(storage: "torch.dtype", inexact: "Inexact", layer: Layer, matrix: "Quantized") -> Rewritten:
    from dataclasses import replace

    from compress.formats.compressed_tensors import CompressedTensors
    from compress.formats.packed import largest_shift

    scale = _scales(matrix.scale, storage, layer.stem, inexact)
    stored = replace(matrix, scale=scale)
    tensors = CompressedTensors().encode(f"{layer.stem}.weight", stored.parts(), layer.scheme)
    return Rewritten(tensors, stored.dequantize(), largest_shift(matrix.scale, scale))


def _scales(scale: "torch.Tensor", storage: "torch.dtype", stem: str, inexact: "Inexact") -> "torch.Tensor":
    import torch

    stored = scale.to(storage)
    lost = ~torch.isfinite(stored) | ((stored == 0) & (scale != 0))
    if bool(lost.any()):
        raise PlanError(
            f"{stem}: scale {float(scale[lost][0]):.6g} is out of {_word(storage)}'s range",
            "keep the GPTQ checkpoint for engines that read it",
        )
    wrong = stored.to(scale.dtype) != scale
    if inexact == "refuse" and bool(wrong.any()):
        raise PlanError(
            f"{stem}: {int(wrong.sum())} of {scale.numel()} are not exact in {_word(storage)}, the model's "
            f"precision, first scale {float(scale[wrong][0]):.9g}",
            "give --inexact round to store the nearest, as engines do that run the GPTQ checkpoint in it",
        )
    return stored


def _word(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")
