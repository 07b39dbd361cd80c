"""Writing the shard of a unit some of whose float tensors have new values."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from compress.core.errors import ModelError
from compress.core.passes import Meant
from compress.formats.shards import shard_name
from compress.models.load import loaded_dtype
from compress.numerics.fingerprint import fingerprint
from compress.sweep.unit import UnitRecord, write_record
from compress.sweep.walk import Walk

_SAME = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far, relative to the largest value, two ways to compute the same may be apart."""


def agree(
    before: torch.Tensor, after: torch.Tensor, compute: torch.dtype, strays: float = 0.0
) -> tuple[bool, str]:
    """Whether two results are the same but for rounding, and how far they are apart in words.

    Args:
        before: ``[..., width]``.
        after: the same in another way.
        compute: precision in which they were computed.
        strays: share of the positions that may differ in any way.
    """
    before, after = before.float().cpu(), after.float().cpu()
    distances = (after - before).abs().flatten(0, -2).amax(-1)
    kept = distances.sort().values[: len(distances) - int(strays * len(distances))]
    distance = float(kept[-1] if bool(distances.isfinite().all()) else distances.sum())
    size = float(before.abs().max())
    # NaN does not agree.
    same = distance <= _SAME.get(compute, 1e-4) * max(size, 1e-6)
    return same, f"{distance:.3g} (its values reach {size:.3g}) away from itself"


def write_rewritten(
    walk: Walk,
    position: int,
    names: Sequence[str],
    rewrite: Callable[[str, torch.Tensor], torch.Tensor | None],
    layers: list[dict[str, Any]],
    added: Mapping[str, torch.Tensor] | None = None,
    resized: Mapping[str, tuple[tuple[int, ...], float]] | None = None,
) -> UnitRecord:
    """Write one shard: changed tensors changed, all others byte for byte.

    Args:
        position: of the unit.
        names: on disk, of everything in the unit.
        rewrite: the new values of a tensor, by the name of its parameter and the tensor as it is on disk;
            ``None`` where it stays. They are written in the precision of the tensor.
        layers: rows for the table of layers.
        added: tensors that the source does not have, by the names that they get.
        resized: shape and distance to what it was, of each parameter that gets another shape.

    Raises:
        ModelError: a new value is beyond the precision in which it is written.
    """
    checkpoint, added, resized = walk.checkpoint, added or {}, resized or {}
    storage = loaded_dtype(walk.source)
    file = shard_name(position, len(walk.blocks) + 1)
    parameters = {name: checkpoint.target[name] for name in names}
    layout = {
        name: (checkpoint.dtype(name), resized[to][0] if to in resized else checkpoint.shape(name))
        for name, to in parameters.items()
    }
    layout |= {name: (storage, tuple(tensor.shape)) for name, tensor in added.items()}
    meant: dict[str, Meant] = {}

    def bring(name: str) -> torch.Tensor:
        tensor = None if name in added else checkpoint.tensor(name)
        changed = added[name] if tensor is None else rewrite(checkpoint.target[name], tensor)
        if changed is None:
            if tensor is None:
                raise ValueError(f"{name} is neither on disk nor new")
            meant[name] = Meant(fingerprint(tensor), False)
            return tensor
        written = changed.to(layout[name][0])
        if not bool(torch.isfinite(written).all()):
            raise ModelError(
                f"{name} would leave the range of {written.dtype}", "convert the model to bfloat16 first"
            )
        if tensor is None:
            error = 0.0
        else:
            other = resized.get(parameters[name])
            error = _distance(tensor, written) if other is None else other[1]
        # A loader sees the values in the precision that the configuration names.
        meant[name] = Meant(fingerprint(written.to(storage)), True, error)
        return written

    return write_record(walk.target, file, layout, bring, meant, layers, walk.run)


def _distance(before: torch.Tensor, after: torch.Tensor) -> float:
    """Relative Frobenius distance."""
    whole = float(before.float().square().sum(dtype=torch.float64))
    lost = float((after.detach().float().cpu() - before.float()).square().sum(dtype=torch.float64))
    return math.sqrt(lost / whole) if whole else math.sqrt(lost)
