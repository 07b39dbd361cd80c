"""New weights of single layers when the residual stream gets narrower.

With rows for vectors, ``x`` becomes ``z = c x R`` (`compress.numerics.principal`). What writes ``y`` into the
stream writes ``c y R``. A layer ``W`` behind a norm reads ``g n + b`` with ``n = x / rms(x)``; in the narrow
model the norm gives ``m = c n R``, and the layer gets ``W diag(g) R / c``, with ``W b`` in its bias.

Where a layer behind a layer norm has no bias, ``W b`` is added all the same: narrow vectors have a mean of
zero, so the norm may add one to every channel, and a layer that reads that with the same weight in each of
its ``k`` columns, ``W b / k``, reads a constant and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch

from compress.core.errors import ModelError
from compress.models.folds import Fold
from compress.models.probe import input_dimension, is_linear
from compress.models.stream import plain_values
from compress.numerics.precision import full_precision
from compress.numerics.principal import Basis
from compress.sweep.rotation_plan import biased
from compress.sweep.slice_plan import SlicePlan

_CARRIED: Final = 1.0
"""What a layer norm adds to every channel where it carries a constant to layers without a bias."""


@dataclass
class New:
    """New parameters by their names in the model, float32.

    Attributes:
        tensors: their values.
        errors: how far each is from what it was, relative Frobenius distance in the wide model.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def take(self, other: "New") -> None:
        """Take in more."""
        self.tensors |= other.tensors
        self.errors |= other.errors


@dataclass(frozen=True)
class Before:
    """What a norm did: its factors, and what it added; float32 ``[width]``."""

    factors: torch.Tensor
    added: torch.Tensor | None


@final
class SliceWeights:
    """The new parameters of a model, layer by layer.

    Attributes:
        into: ``c R``, float32 ``[width, kept]``.
        back: ``R^T / c``, float32 ``[kept, width]``.
        changes: by the name of a norm, what is added to how its readers see it, float32 ``[width, kept]``.

    Args:
        plan: what is sliced.
        model: the wide one; a layer's parameters must be in memory when it is asked for.
        basis: what the stream is narrowed to.
        device: where products are computed.
    """

    def __init__(self, plan: SlicePlan, model: Any, basis: Basis, device: torch.device) -> None:
        self._plan = plan
        self._model = model
        self.into = basis.into.float().to(device)
        self.back = basis.back.float().to(device)
        self.changes: dict[str, torch.Tensor] = {}
        self._scale = basis.scale
        self._readers, self._writers = set(plan.stream.readers), set(plan.stream.writers)
        self._norm_of = {
            f"{norm.block}.{reader.layer}".removeprefix("."): norm
            for norm in plan.stream.norms
            for reader in norm.readers
        }

    def role(self, layer: str) -> str:
        """What a layer is to the stream."""
        roles = {"reads": self._readers, "writes": self._writers}
        return " ".join(role for role, members in roles.items() if layer in members)

    def norm_of(self, layer: str) -> Fold | None:
        """The norm that a layer reads."""
        return self._norm_of.get(layer)

    def seen(self, norm: Fold) -> torch.Tensor:
        """How readers see what a narrow norm gives as what the wide one gave, ``[width, kept]``."""
        with full_precision():
            found = self.before(norm).factors.unsqueeze(1) * self.back.T
        return found + self.changes[norm.name] if norm.name in self.changes else found

    @torch.no_grad()
    def of_layer(self, layer: str) -> New:
        """New parameters of a linear layer or an embedding.

        Raises:
            ModelError: a norm in front of it adds what it cannot take.
        """
        module = self._model.get_submodule(layer)
        weight = module.weight.float()
        if not is_linear(module):
            return self._embedding(layer, weight)
        transposed = input_dimension(module) == 0
        matrix = weight.mT if transposed else weight
        bias = module.bias.float() if module.bias is not None else None
        new = New()
        if layer in self._readers:
            matrix, bias = self._reading(layer, matrix, bias, new)
        if layer in self._writers:
            matrix, bias = self._writing(layer, matrix, bias, new)
        new.tensors[f"{layer}.weight"] = (matrix.mT if transposed else matrix).contiguous()
        if bias is not None:
            new.tensors[f"{layer}.bias"] = bias
        return new

    @torch.no_grad()
    def of_norm(self, norm: Fold) -> New:
        """New parameters of a norm: it only normalises, and carries a constant where one is needed."""
        new = New()
        carries = self._carries(norm)
        for leaf, value in plain_values(norm).items():
            name = f"{norm.name}.{leaf}"
            fill = _CARRIED if carries and leaf != norm.weight else value
            new.tensors[name] = torch.full((self._plan.kept,), fill, device=self.into.device)
            new.errors[name] = 1.0
        return new

    def before(self, norm: Fold) -> Before:
        """What the norm of the wide model does."""
        module = self._model.get_submodule(norm.name)
        others = [module.get_parameter(leaf).float() for leaf in norm.offsets if leaf != norm.weight]
        factors = module.get_parameter(norm.weight).float() + norm.offsets[norm.weight]
        return Before(factors, others[0] if others else None)

    # -- single layers -------------------------------------------------------------------------------

    def _embedding(self, layer: str, weight: torch.Tensor) -> New:
        with full_precision():
            made = weight @ self.into
        error = _outside(made, self._scale, weight)
        return New({f"{layer}.weight": made * self._factor(layer)}, {f"{layer}.weight": error})

    def _reading(
        self, layer: str, matrix: torch.Tensor, bias: torch.Tensor | None, new: New
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        norm = self._norm_of.get(layer)
        with full_precision():
            if norm is None:
                made = matrix @ self.back.T
                new.errors[f"{layer}.weight"] = _outside(made, 1 / self._scale, matrix)
                return made, bias
            before = self.before(norm)
            made = matrix @ self.seen(norm)
            plain = matrix * before.factors
            new.errors[f"{layer}.weight"] = _distance(made @ self.into.T, plain)
            if before.added is None or not bool(before.added.any()):
                return made, bias
            constant = matrix @ before.added
        if bias is not None:
            return made, bias + constant
        return made + constant.unsqueeze(1) / (_CARRIED * self._plan.kept), None

    def _writing(
        self, layer: str, matrix: torch.Tensor, bias: torch.Tensor | None, new: New
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        factor = self._factor(layer)
        with full_precision():
            made = self.into.T @ matrix
            lost = _outside(made, self._scale, matrix)
            new.errors[f"{layer}.weight"] = max(lost, new.errors.get(f"{layer}.weight", 0.0))
            if bias is not None:
                moved = bias @ self.into
                new.errors[f"{layer}.bias"] = _outside(moved, self._scale, bias)
                bias = moved * factor
        return made * factor, bias

    def _factor(self, layer: str) -> float:
        return self._plan.factors.get(layer, 1.0)

    def _carries(self, norm: Fold) -> bool:
        """Whether a norm has to carry a constant to a layer without a bias.

        Raises:
            ModelError: it has to and cannot.
        """
        added = self.before(norm).added
        if added is None or biased(self._model, norm) or not bool(added.any()):
            return False
        if not self._plan.stream.keeps_mean:
            raise ModelError(
                f"{norm.name} adds to what it normalises, and a layer behind it has no bias to take that",
                "this model's residual stream cannot be sliced; use prune.width or prune.depth",
            )
        return True


def resized(
    tensors: Mapping[str, torch.Tensor], errors: Mapping[str, float], model: Any
) -> dict[str, tuple[tuple[int, ...], float]]:
    """Shape and distance of new parameters that have another shape than in the wide model."""
    return {
        name: (tuple(tensor.shape), errors[name])
        for name, tensor in tensors.items()
        if tuple(tensor.shape) != tuple(model.get_parameter(name).shape)
    }


def _outside(made: torch.Tensor, scale: float, before: torch.Tensor) -> float:
    """Relative size of what of a matrix lies outside the span, from what lies inside times a factor."""
    whole = float(before.square().sum(dtype=torch.float64))
    inside = float(made.square().sum(dtype=torch.float64)) / scale**2
    return max(0.0, 1 - inside / whole) ** 0.5 if whole else 0.0


def _distance(after: torch.Tensor, before: torch.Tensor) -> float:
    whole = float(before.square().sum(dtype=torch.float64))
    return (float((after - before).square().sum(dtype=torch.float64)) / whole) ** 0.5 if whole else 0.0
