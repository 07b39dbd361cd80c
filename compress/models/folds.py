"""Folds: where a factor can move from the layers that read a channel into what produces it.

What a layer multiplies with column ``j`` of its weight may be divided by ``s_j`` when the column is
multiplied by it. The division costs nothing where something before the layer can take it: the weight of a
norm, or the rows of another linear layer. How they are found is in `compress.models.fold_search`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from compress.models.probe import input_dimension, output_dimension
from compress.numerics.grouping import row_chunks

Kind = Literal["norm", "linear"]


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer whose input can be scaled.

    Attributes:
        layer: its path, from the block on; of a matrix that is no linear layer (a router, fused experts), the
            path of the parameter.
        channels: int64 ``[columns]``, for each input column the channel of the fold that it belongs to.
        dimension: where its columns lie in such a matrix, counted from the end; ``None`` for a linear layer.
    """

    layer: str
    channels: torch.Tensor
    dimension: int | None = None

    @property
    def parameter(self) -> str:
        """The path of its weight, from the block on."""
        return self.layer if self.dimension is not None else f"{self.layer}.weight"


@dataclass(frozen=True, eq=False)
class Fold:
    """A factor for each channel can move from the producer into the readers.

    Attributes:
        block: path of the block.
        producer: path of a norm or of a linear layer, from the block on.
        kind: which of both.
        rows: int64 ``[channels]``, the producer's output feature of each channel.
        readers: all layers that see the producer's features, in the order of the model.
        offsets: for each parameter of the producer that is divided, what is added to it before it acts.
        weight: the parameter among them that multiplies.
        followers: matrices that see the features as well, and have no say in the factors: routers.
    """

    block: str
    producer: str
    kind: Kind
    rows: torch.Tensor
    readers: tuple[Reader, ...]
    offsets: Mapping[str, float]
    weight: str = "weight"
    followers: tuple[Reader, ...] = ()

    @property
    def name(self) -> str:
        """The producer by its path in the model."""
        return f"{self.block}.{self.producer}".removeprefix(".")

    @property
    def parameters(self) -> tuple[str, ...]:
        """Every parameter that a factor changes, by its path in the model."""
        own = tuple(f"{self.name}.{leaf}" for leaf in self.offsets)
        readers = (*self.readers, *self.followers)
        return (*own, *(f"{self.block}.{reader.parameter}" for reader in readers))

    def rescalings(self, model: nn.Module, scales: torch.Tensor) -> dict[str, "Rescaling"]:
        """What becomes of every parameter when the readers' inputs are divided by factors.

        Args:
            model: whose shapes are looked at; its weights are not.
            scales: positive, ``[channels]``.
        """
        scales = scales.double().cpu()
        changes: dict[str, Rescaling] = {}
        module = model.get_submodule(self.name)
        for leaf, offset in self.offsets.items():
            dimension = output_dimension(module, leaf) if self.kind == "linear" else 0
            size = module.get_parameter(leaf).shape[dimension or 0]
            factors = torch.ones(size, dtype=torch.float64)
            factors[self.rows] = 1 / scales
            changes[f"{self.name}.{leaf}"] = Rescaling({dimension or 0: factors}, offset)
        for reader in (*self.readers, *self.followers):
            dimension = reader.dimension
            if dimension is None:
                dimension = input_dimension(model.get_submodule(f"{self.block}.{reader.layer}"))
            changes[f"{self.block}.{reader.parameter}"] = Rescaling({dimension: scales[reader.channels]})
        return changes


@dataclass(frozen=True, eq=False)
class Rescaling:
    """One parameter with its places along some dimensions multiplied.

    Attributes:
        factors: float64 vectors by dimension; one counted from the end holds for a part of a parameter as
            well (an expert by itself, as it lies on disk).
        offset: what the model adds to the parameter before it acts.
    """

    factors: Mapping[int, torch.Tensor]
    offset: float = 0.0

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The new values of a tensor laid out like the parameter: computed in float64, in its own dtype."""
        result = torch.empty_like(tensor)
        for rows in row_chunks(tensor.reshape(tensor.shape[0], -1)):
            values = tensor[rows].double() + self.offset
            for dimension, factors in self.factors.items():
                along = dimension % values.dim()
                part = factors[rows] if along == 0 else factors
                shape = [-1 if place == along else 1 for place in range(values.dim())]
                values *= part.to(values.device).view(shape)
            result[rows] = (values - self.offset).to(tensor.dtype)
        return result

    def joined(self, other: "Rescaling") -> "Rescaling":
        """This one and another of the same parameter."""
        factors = dict(self.factors)
        for dimension, more in other.factors.items():
            factors[dimension] = factors[dimension] * more if dimension in factors else more
        return Rescaling(factors, self.offset)


@dataclass(frozen=True)
class Folds:
    """What was found in all blocks of a model.

    Attributes:
        folds: block by block, norms first; no layer is a reader of two.
        unfolded: layers of the blocks whose input nothing can scale, by their path in the model, with the
            reason.
    """

    folds: tuple[Fold, ...]
    unfolded: Mapping[str, str]
