"""What stays of each tensor when some channels and heads stay: places along its dimensions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compress.core.errors import PlanError
from compress.models.channels import Channels
from compress.models.checkpoint import Checkpoint
from compress.models.probe import input_dimension, output_dimension
from compress.sweep.config_search import Shapes


@dataclass(frozen=True)
class Cut:
    """What stays of one parameter: for each dimension that is cut, the places, in order."""

    parameter: str
    places: Mapping[int, torch.Tensor]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of what stays of a tensor laid out like the parameter."""
        for dimension, places in self.places.items():
            tensor = tensor.index_select(dimension, places.to(tensor.device))
        return tensor.contiguous()


@dataclass(frozen=True)
class Kept:
    """What stays in front of one layer: the parts of each group that stays, in order."""

    channels: Channels
    parts: Mapping[int, Sequence[int]]

    @property
    def columns(self) -> list[int]:
        """Input columns of the reader that stay, in order."""
        groups = self.channels.groups
        return sorted(
            column
            for group, parts in self.parts.items()
            for p in parts
            for column in groups[group].parts[p].columns
        )

    def gone(self, producer: str) -> list[int]:
        """Output features of a producer (named from the block on) that go."""
        gone: list[int] = []
        for number, group in enumerate(self.channels.groups):
            staying = self.parts.get(number)
            if staying is None:
                gone += group.shared.get(producer, ())
            for place, part in enumerate(group.parts):
                if staying is None or place not in staying:
                    gone += part.rows.get(producer, ())
        return gone


def cuts_of(model: Any, entry: Channels, kept: Kept) -> list[Cut]:
    """What stays of the reader's weight and of everything that feeds it."""
    reader = model.get_submodule(entry.reader)
    cuts = [Cut(f"{entry.reader}.weight", {input_dimension(reader): torch.tensor(kept.columns)})]
    for producer in entry.producers:
        path = f"{entry.block}.{producer}"
        module = model.get_submodule(path)
        for leaf, parameter in module.named_parameters(recurse=False):
            dimension = output_dimension(module, leaf)
            if dimension is not None:
                staying = complement(kept.gone(producer), parameter.shape[dimension])
                cuts.append(Cut(f"{path}.{leaf}", {dimension: staying}))
    return cuts


def ranges(numbers: Sequence[int]) -> str:
    """Rising numbers in few words: ``0-3 5 7-8``."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def complement(places: Sequence[int], size: int) -> torch.Tensor:
    """All other places of so many, int64, in order."""
    mask = torch.ones(size, dtype=torch.bool)
    mask[list(places)] = False
    return mask.nonzero().flatten()


def joined(first: Cut, second: Cut) -> Cut:
    """Two cuts of one parameter: along two dimensions, or both along one."""
    places = dict(first.places)
    for dimension, staying in second.places.items():
        before = places.get(dimension)
        places[dimension] = staying if before is None else staying[torch.isin(staying, before)]
    return Cut(first.parameter, places)


def merged(first: Mapping[str, Cut], second: Mapping[str, Cut]) -> dict[str, Cut]:
    """Two sets of cuts by parameter as one."""
    both = {name: joined(first[name], cut) for name, cut in second.items() if name in first}
    return {**first, **second, **both}


def check_on_disk(shapes: Shapes, model: Any, checkpoint: Checkpoint) -> None:
    """Refuse tensors that transformers converts while it loads: they cannot be cut where they lie.

    Args:
        shapes: of all parameters of the narrower model.

    Raises:
        PlanError: naming the first such parameter.
    """
    on_disk: dict[str, list[str]] = {}
    for name in checkpoint.names:
        on_disk.setdefault(checkpoint.target[name], []).append(name)
    for name, parameter in model.named_parameters():
        files = on_disk.get(name, [])
        if tuple(parameter.shape) == shapes[name]:
            continue
        if len(files) != 1 or checkpoint.shape(files[0]) != tuple(parameter.shape):
            raise PlanError(
                f"{name} is converted while transformers loads it, so it cannot be cut on disk",
                "save the model with a current transformers first, and prune that",
            )
