"""Writing the shard of a unit whose tensors lose rows, take another name, get new values, or stay.

What stays is the same to the bit: values are taken from the tensors as they lie on disk and never pass
through an arithmetic.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from compress.core.passes import Meant
from compress.formats.shards import shard_name
from compress.models.load import loaded_dtype
from compress.numerics.fingerprint import fingerprint
from compress.sweep.narrow_cuts import Cut
from compress.sweep.unit import UnitRecord, write_record
from compress.sweep.walk import Walk


@dataclass(frozen=True)
class Piece:
    """Where one tensor of the result comes from.

    Attributes:
        source: its name on disk in the source.
        places: for each dimension that is cut, what stays, int64 in order.
        moved: whether it is, or may be, another tensor than the one that had its name.
        fitted: new values in place of those on disk, in their precision; ``None`` where these are taken.
        error: relative Frobenius distance of the new values to those on disk.
    """

    source: str
    places: Mapping[int, torch.Tensor] = field(default_factory=dict)
    moved: bool = False
    fitted: torch.Tensor | None = None
    error: float = 0.0

    @property
    def changed(self) -> bool:
        """Whether the result holds other values under this name than the source."""
        return self.moved or bool(self.places) or self.fitted is not None

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what stays of a tensor, or of its new values."""
        before = before if self.fitted is None else tuple(self.fitted.shape)
        kept = {dimension: len(places) for dimension, places in self.places.items()}
        return tuple(kept.get(dimension, size) for dimension, size in enumerate(before))


def as_they_are(names: list[str]) -> dict[str, Piece]:
    """Tensors that stay, by their names on disk."""
    return {name: Piece(name) for name in names}


def finish_unread(
    walk: Walk, unit: str, position: int, pieces: Mapping[str, Piece], *, units: int | None = None
) -> UnitRecord:
    """Write a unit through which no batch runs, and note that it is finished.

    Args:
        unit: its name.
        position, pieces, units: as for `write_pieces`.
    """
    walk.run.reporter.event("block.start", block=unit, position=position)
    record = write_pieces(walk, position, pieces, [], units=units)
    walk.finish(position, record, None)
    return record


def write_pieces(
    walk: Walk,
    position: int,
    pieces: Mapping[str, Piece],
    layers: list[dict[str, Any]],
    *,
    units: int | None = None,
) -> UnitRecord:
    """Write one shard.

    Args:
        position: of the unit.
        pieces: by the names that they get on disk.
        layers: rows for the table of layers.
        units: of the result, where they are not as many as those of the source.
    """
    checkpoint = walk.checkpoint
    file = shard_name(position, len(walk.blocks) + 1 if units is None else units)
    loaded = loaded_dtype(walk.source)
    layout = {
        name: (checkpoint.dtype(piece.source), piece.shape(checkpoint.shape(piece.source)))
        for name, piece in pieces.items()
    }
    meant: dict[str, Meant] = {}

    def bring(name: str) -> torch.Tensor:
        piece = pieces[name]
        tensor = checkpoint.tensor(piece.source) if piece.fitted is None else piece.fitted
        if not piece.changed:
            meant[name] = Meant(fingerprint(tensor), False)
            return tensor
        before = _squares(tensor) if piece.places else 0.0
        if piece.places:
            tensor = Cut(name, piece.places).of(tensor)
        lost = max(0.0, before - _squares(tensor)) if before else 0.0
        error = (lost / before) ** 0.5 if before else piece.error
        # A loader sees the values in the precision that the configuration names.
        seen = tensor.to(loaded) if tensor.is_floating_point() else tensor
        meant[name] = Meant(fingerprint(seen), True, error)
        return tensor

    return write_record(walk.target, file, layout, bring, meant, layers, walk.run)


def _squares(tensor: torch.Tensor) -> float:
    return float(tensor.float().square().sum(dtype=torch.float64))
