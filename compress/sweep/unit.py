"""One part of a model on its way to disk: a block, or everything outside the blocks.

A unit is finished when its shard and its record are written; the record is written last, so its
existence is the point from which a run resumes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.core.passes import Meant
from compress.core.run import Run
from compress.core.scheme import Scheme
from compress.formats.shards import write_shard
from compress.formats.weight_format import WeightFormat
from compress.models.checkpoint import Checkpoint
from compress.numerics.affine import Quantized
from compress.numerics.fingerprint import fingerprint
from compress.sweep.matrices import Matrix


@dataclass(frozen=True)
class UnitRecord:
    """What a finished unit left behind.

    Attributes:
        file: its shard.
        names: tensors in the shard.
        bytes: of all tensors.
        tensors: what each weight must be after loading, by float name on disk.
        layers: rows for the table of layers.
    """

    file: str
    names: list[str]
    bytes: int
    tensors: dict[str, Meant]
    layers: list[dict[str, Any]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the record, complete or not at all."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> "UnitRecord | None":
        """The record of a finished unit, or ``None`` where it is not finished."""
        if not path.is_file():
            return None
        document = json.loads(path.read_text(encoding="utf-8"))
        document["tensors"] = {name: Meant(**meant) for name, meant in document["tensors"].items()}
        return cls(**document)


@dataclass(frozen=True)
class Encoded:
    """One float weight of the source as it will lie on disk."""

    tensors: Mapping[str, torch.Tensor]
    meant: Meant


def encode(
    results: Mapping[Matrix, Quantized],
    errors: Mapping[str, float],
    checkpoint: Checkpoint,
    weight_format: WeightFormat,
) -> dict[str, Encoded]:
    """Rounded matrices by the names that their float weights have on disk.

    Fused experts are split as transformers would split them when it saves the model: integers, scales and
    zero points go through the same reversal as the weight.

    Args:
        errors: relative error by matrix name.
    """
    encoded: dict[str, Encoded] = {}
    fused: dict[str, list[tuple[Matrix, Quantized]]] = {}
    for matrix, quantized in results.items():
        if matrix.expert is not None:
            fused.setdefault(matrix.parameter, []).append((matrix, quantized))
            continue
        # A weight tied to another has no tensor of its own on disk yet; it gets its module's name.
        name = matrix.on_disk[0] if matrix.on_disk else matrix.parameter
        parts = _parts(quantized)
        meant = Meant(fingerprint(quantized.dequantize()), True, errors[matrix.name])
        encoded[name] = Encoded(weight_format.encode(name, parts, quantized.scheme), meant)
    for parameter, experts in fused.items():
        encoded.update(_encode_experts(parameter, experts, errors, checkpoint, weight_format))
    return encoded


def _encode_experts(
    parameter: str,
    experts: list[tuple[Matrix, Quantized]],
    errors: Mapping[str, float],
    checkpoint: Checkpoint,
    weight_format: WeightFormat,
) -> dict[str, Encoded]:
    scheme = experts[0][1].scheme
    split: dict[str, dict[str, torch.Tensor]] = {}
    for part in _parts(experts[0][1]):
        stacked = torch.stack([_parts(quantized)[part] for _, quantized in experts])
        for name, tensor in checkpoint.to_disk({parameter: stacked}).items():
            split.setdefault(name, {})[part] = tensor.contiguous()
    error = max(errors[matrix.name] for matrix, _ in experts)
    return {
        name: Encoded(
            weight_format.encode(name, parts, scheme),
            Meant(fingerprint(_quantized(parts, scheme).dequantize()), True, error),
        )
        for name, parts in split.items()
    }


def _parts(quantized: Quantized) -> dict[str, torch.Tensor]:
    parts = {"q": quantized.q, "scale": quantized.scale}
    return parts if quantized.zero is None else {**parts, "zero": quantized.zero}


def _quantized(parts: Mapping[str, torch.Tensor], scheme: Scheme) -> Quantized:
    return Quantized(parts["q"], parts["scale"], parts.get("zero"), scheme)


def write_unit(
    folder: Path,
    file: str,
    names: list[str],
    encoded: Mapping[str, Encoded],
    layers: list[dict[str, Any]],
    checkpoint: Checkpoint,
    run: Run,
) -> UnitRecord:
    """Write the shard of one unit: the encoded weights, and a copy of every other tensor, byte for byte.

    Args:
        names: the names on disk of everything in the unit.
    """
    changed = {name: tensor for entry in encoded.values() for name, tensor in entry.tensors.items()}
    copied = [name for name in names if name not in encoded]
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in changed.items()}
    layout |= {name: (checkpoint.dtype(name), checkpoint.shape(name)) for name in copied}
    meant = {name: entry.meant for name, entry in encoded.items()}

    def bring(name: str) -> torch.Tensor:
        if name in changed:
            return changed[name]
        tensor = checkpoint.tensor(name)
        meant[name] = Meant(fingerprint(tensor), False)
        return tensor

    size = write_shard(
        folder / file,
        layout,
        bring,
        lambda name: run.reporter.event("shard.tensor", file=file, tensor=name),
    )
    return UnitRecord(file, sorted(layout), size, dict(sorted(meant.items())), layers)
