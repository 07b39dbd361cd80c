"""Writing the shard of a unit whose tensors lose rows and columns, some of them with layers fitted again."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from compress.core.passes import Meant
from compress.formats.shards import shard_name, write_shard
from compress.models.load import loaded_dtype
from compress.numerics.fingerprint import fingerprint
from compress.sweep.narrow_cuts import Cut
from compress.sweep.narrow_repair import Repaired
from compress.sweep.unit import UnitRecord
from compress.sweep.walk import Walk


def write_narrowed(
    walk: Walk,
    position: int,
    names: Sequence[str],
    cuts: Mapping[str, Cut],
    layers: list[dict[str, Any]],
    made: Mapping[str, Repaired],
) -> UnitRecord:
    """Write one shard: cut tensors cut and fitted again, all others byte for byte.

    Args:
        position: of the unit.
        names: on disk, of everything in the unit.
        cuts: by the names of parameters.
        layers: rows for the table of layers.
        made: layers that were fitted again, by path.
    """
    checkpoint, run = walk.checkpoint, walk.run
    file = shard_name(position, len(walk.blocks) + 1)
    loaded = loaded_dtype(walk.source)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in names:
        cut, shape = cuts.get(checkpoint.target[name]), checkpoint.shape(name)
        layout[name] = (checkpoint.dtype(name), shape if cut is None else cut.shape(shape))
    meant: dict[str, Meant] = {}

    def bring(name: str) -> torch.Tensor:
        tensor, target = checkpoint.tensor(name), checkpoint.target[name]
        cut = cuts.get(target)
        written = _written(tensor, target, cut, made)
        if written is None:
            meant[name] = Meant(fingerprint(tensor), False)
            return tensor
        # A loader sees the values in the precision that the configuration names.
        meant[name] = Meant(fingerprint(written.to(loaded)), True, _distance(tensor, cut, written))
        return written

    size = write_shard(
        walk.target / file,
        layout,
        bring,
        lambda name: run.reporter.event("shard.tensor", file=file, tensor=name),
    )
    return UnitRecord(file, sorted(layout), size, dict(sorted(meant.items())), layers)


def _written(
    tensor: torch.Tensor, target: str, cut: Cut | None, made: Mapping[str, Repaired]
) -> torch.Tensor | None:
    """What is written in place of a tensor, cut and fitted again; ``None`` where it stays.

    Args:
        target: name of its parameter.
        made: layers that were fitted again, by path.
    """
    layer, _, leaf = target.rpartition(".")
    again = made.get(layer)
    if again is not None and leaf == "weight" and cut is not None:
        return again.cut(cut)
    if again is not None and leaf == "bias" and again.bias is not None:
        return again.bias if cut is None else cut.of(again.bias)
    return None if cut is None else cut.of(tensor)


def _distance(tensor: torch.Tensor, cut: Cut | None, written: torch.Tensor) -> float:
    """Relative Frobenius distance to a tensor of what is left of it, with zeros where it was cut."""
    kept = tensor if cut is None else cut.of(tensor)
    whole, stays = _square(tensor), _square(kept)
    lost = max(0.0, whole - stays) + _square(written.float() - kept.float())
    return math.sqrt(lost / whole) if whole else math.sqrt(lost)


def _square(tensor: torch.Tensor) -> float:
    return float(tensor.float().square().sum(dtype=torch.float64))
