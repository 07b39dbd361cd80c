"""One part of a model on its way to disk: a block, or everything outside the blocks.

A unit is finished when its shard and its record are written; the record is written last, so its
existence is the point from which a run resumes.
"""

import json
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.core.passes import Meant
from compress.core.run import Run
from compress.formats.shards import write_shard
from compress.models.checkpoint import Checkpoint
from compress.numerics.fingerprint import fingerprint
from compress.sweep.matrices import Matrix
from compress.sweep.memory import return_freed
from compress.sweep.treatment import Replacement, Treatment


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
    results: Mapping[Matrix, Replacement],
    errors: Mapping[str, float],
    labels: Mapping[Matrix, Hashable],
    treatment: Treatment,
    checkpoint: Checkpoint,
) -> dict[str, Encoded]:
    """Treated matrices by the names that their float weights have on disk.

    Fused experts are split as transformers would split them when it saves the model: integers, scales and
    zero points go through the same reversal as the weight.

    Args:
        errors: relative error by matrix name.
    """
    encoded: dict[str, Encoded] = {}
    fused: dict[str, list[Matrix]] = {}
    for matrix, replacement in results.items():
        if matrix.expert is not None:
            fused.setdefault(matrix.parameter, []).append(matrix)
            continue
        # A weight tied to another has no tensor of its own on disk yet; it gets its module's name.
        name = matrix.on_disk[0] if matrix.on_disk else matrix.parameter
        value, parts = replacement.value(), replacement.parts()
        if matrix.transposed:
            value, parts = value.mT, {part: tensor.mT for part, tensor in parts.items()}
        meant = Meant(fingerprint(value), True, errors[matrix.name])
        encoded[name] = Encoded(treatment.encode(name, parts, labels[matrix]), meant)
        return_freed()
    for parameter, experts in fused.items():
        pieces = [results[matrix].parts() for matrix in experts]
        stacked = {part: torch.stack([entry[part] for entry in pieces]) for part in pieces[0]}
        error = max(errors[matrix.name] for matrix in experts)
        label = labels[experts[0]]
        for name, split in _split(parameter, stacked, checkpoint).items():
            meant = Meant(fingerprint(treatment.rebuilt(split, label).value()), True, error)
            encoded[name] = Encoded(treatment.encode(name, split, label), meant)
    return encoded


def _split(
    parameter: str, stacked: Mapping[str, torch.Tensor], checkpoint: Checkpoint
) -> dict[str, dict[str, torch.Tensor]]:
    """The parts of a fused parameter ``[experts, rows, ...]`` by the names of its pieces on disk."""
    pieces: dict[str, dict[str, torch.Tensor]] = {}
    for part, tensor in stacked.items():
        for name, piece in checkpoint.to_disk({parameter: tensor}).items():
            pieces.setdefault(name, {})[part] = piece.contiguous()
    return pieces


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

    return write_record(folder, file, layout, bring, meant, layers, run)


def write_record(
    folder: Path,
    file: str,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    bring: Callable[[str], torch.Tensor],
    meant: Mapping[str, Meant],
    layers: list[dict[str, Any]],
    run: Run,
) -> UnitRecord:
    """Write the shard of one unit, and tell what is in it.

    Args:
        layout, bring: as for `compress.formats.shards.write_shard`.
        meant: what each weight must be after loading; ``bring`` may fill it on its way.
        layers: rows for the table of layers.
    """
    size = write_shard(
        folder / file,
        layout,
        bring,
        lambda name: run.reporter.event("shard.tensor", file=file, tensor=name),
    )
    return UnitRecord(file, sorted(layout), size, dict(sorted(meant.items())), layers)
