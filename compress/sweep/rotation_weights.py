"""New weights of single layers when the residual stream and the values of heads are rotated.

With rows for vectors, ``x`` becomes ``x Q``. A layer ``y = x W^T + b`` that reads ``norm(x)`` times ``g``
gets ``W diag(g) Q``, one that writes ``y`` into the stream ``Q^T W`` and ``b Q``, an embedding ``E Q``. What
a norm adds goes into the biases of its readers, or stays in the norm as ``(b / g) Q``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

from compress.core.errors import ModelError
from compress.models.folds import Fold
from compress.models.probe import input_dimension, is_linear
from compress.models.stream import plain_values
from compress.numerics.precision import full_precision
from compress.numerics.rotation import rotation
from compress.sweep.rotation_plan import Heads, RotationPlan, biased

_LEAST = 1e-4
"""Of a norm's weight relative to its largest, where what it adds has to be divided by it."""


@dataclass(frozen=True)
class _Before:
    """What the norm in front of a layer did: its factors, and what it added."""

    factors: torch.Tensor
    added: torch.Tensor | None


@final
class Turns:
    """The new parameters of a model, layer by layer.

    Args:
        plan: what is rotated.
        model: whose parameters are read; a layer's must be in memory when it is asked for.
        seed: of the rotations.
        device: where products are computed.
    """

    def __init__(self, plan: RotationPlan, model: Any, seed: int, device: torch.device) -> None:
        self._plan = plan
        self._model = model
        stream = plan.stream
        self.matrix = rotation(stream.width, seed, keeps_mean=stream.keeps_mean).float().to(device)
        self._readers, self._writers = set(stream.readers), set(stream.writers)
        self._norm_of = {
            f"{norm.block}.{reader.layer}".removeprefix("."): norm
            for norm in stream.norms
            for reader in norm.readers
        }
        self._values: dict[str, Heads] = {entry.producer: entry for entry in plan.heads}
        self._mixed: dict[str, Heads] = {entry.reader: entry for entry in plan.heads}
        self._by_size = {
            size: rotation(size, seed + 1).float().to(device)
            for size in {entry.rows.shape[1] for entry in plan.heads}
        }

    def layers(self, prefix: str) -> list[str]:
        """All layers to change whose path starts so, sorted."""
        names = self._readers | self._writers | set(self._values) | set(self._mixed)
        return sorted(name for name in names if name.startswith(prefix))

    def roles(self, layer: str) -> str:
        """What a layer is to the rotations."""
        roles = {
            "reads": self._readers,
            "writes": self._writers,
            "values": self._values,
            "heads": self._mixed,
        }
        return " ".join(role for role, members in roles.items() if layer in members)

    @torch.no_grad()
    def of_layer(self, layer: str) -> dict[str, torch.Tensor]:
        """New parameters of a linear layer or an embedding by their names in the model, float32."""
        module = self._model.get_submodule(layer)
        weight = module.weight.float()
        if not is_linear(module):
            with full_precision():
                return {f"{layer}.weight": weight @ self.matrix}
        transposed = input_dimension(module) == 0
        matrix = weight.mT if transposed else weight
        before = bias = module.bias.float() if module.bias is not None else None
        with full_precision():
            if layer in self._readers:
                matrix, bias = self._reading(layer, matrix, bias)
            if layer in self._mixed:
                matrix = _columns_turned(matrix, self._mixed[layer].columns, self._by_size)
            if layer in self._writers:
                matrix = self.matrix.T @ matrix
                bias = None if bias is None else bias @ self.matrix
            if layer in self._values:
                rows = self._values[layer].rows
                matrix = _columns_turned(matrix.mT, rows, self._by_size).mT
                bias = None if bias is None else _columns_turned(bias.unsqueeze(0), rows, self._by_size)[0]
        new = {f"{layer}.weight": (matrix.mT if transposed else matrix).contiguous()}
        # The bias of a layer that only reads stays as it is, where no norm adds to what it reads.
        return new if bias is None or bias is before else {**new, f"{layer}.bias": bias}

    @torch.no_grad()
    def of_norm(self, norm: Fold) -> dict[str, torch.Tensor]:
        """New parameters of a norm by their names in the model, float32: it only normalises.

        Raises:
            ModelError: what it adds would have to be divided by a weight of nothing.
        """
        module = self._model.get_submodule(norm.name)
        new = {
            f"{norm.name}.{leaf}": torch.full_like(module.get_parameter(leaf).float(), value)
            for leaf, value in plain_values(norm).items()
        }
        before = self._before(norm)
        if before.added is None or biased(self._model, norm) or not bool(before.added.any()):
            return new
        size = before.factors.abs()
        lost = (size < _LEAST * size.max()) & (before.added != 0)
        if bool(lost.any()):
            raise ModelError(
                f"{norm.name} adds to {int(lost.sum())} channels that it multiplies by nothing, and a layer "
                "behind it has no bias to take that",
                "this model's residual stream cannot be rotated; use transform.awq or transform.smoothquant",
            )
        added = torch.where(before.added == 0, 0, before.added / before.factors)
        leaf = next(name for name in norm.offsets if name != norm.weight)
        new[f"{norm.name}.{leaf}"] = added @ self.matrix
        return new

    def _before(self, norm: Fold) -> _Before:
        module = self._model.get_submodule(norm.name)
        others = [module.get_parameter(leaf).float() for leaf in norm.offsets if leaf != norm.weight]
        factors = module.get_parameter(norm.weight).float() + norm.offsets[norm.weight]
        return _Before(factors, others[0] if others else None)

    def _reading(
        self, layer: str, matrix: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        norm = self._norm_of.get(layer)
        if norm is not None:
            before = self._before(norm)
            if before.added is not None and biased(self._model, norm) and bias is not None:
                bias = bias + matrix @ before.added
            matrix = matrix * before.factors
        return matrix @ self.matrix, bias


def _columns_turned(
    matrix: torch.Tensor, places: torch.Tensor, by_size: Mapping[int, torch.Tensor]
) -> torch.Tensor:
    """Columns rotated head by head: ``places [heads, size]``."""
    turned = matrix.clone()
    turn = by_size[places.shape[1]]
    for columns in places.to(matrix.device):
        turned[:, columns] = matrix[:, columns] @ turn
    return turned


def kurtosis(weight: torch.Tensor) -> float:
    """How heavy the tails of a weight's values are: fourth moment by the squared second, 3 for a Gaussian."""
    squares = weight.float().square()
    mean = float(squares.mean(dtype=torch.float64))
    return float(squares.square().mean(dtype=torch.float64)) / mean**2 if mean > 0 else 0.0
