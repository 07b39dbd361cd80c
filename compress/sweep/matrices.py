"""Which matrices of a model can be compressed, found from its modules and from how they lie on disk."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.models.checkpoint import Checkpoint

# A matrix that is no layer of its own (a router, a table of relative positions) may stay in floats without
# a word only while it is a small part of its block; a larger one has to be ignored by name.
SMALL_SHARE = 0.05


@dataclass(frozen=True)
class Matrix:
    """One matrix ``[rows, columns]`` that multiplies activations.

    Attributes:
        module: path of the module that holds it.
        parameter: name of the parameter in the module tree.
        expert: index into a fused parameter ``[experts, rows, columns]``; ``None`` for a plain layer.
        kind: class name of the module.
        rows: output features.
        columns: input features.
        on_disk: names on disk of its float weight, several where it is split there; empty where the
            weight is tied to another.
        transposed: whether the parameter lies with its input features in front, as GPT-2's do.
        pooled: whether it is all experts of a fused parameter at once, their rows stacked.
    """

    module: str
    parameter: str
    expert: int | None
    kind: str
    rows: int
    columns: int
    on_disk: tuple[str, ...]
    transposed: bool = False
    pooled: bool = False

    @property
    def name(self) -> str:
        """How plans, tables and patterns name it."""
        if self.pooled:
            return self.parameter
        return self.module if self.expert is None else f"{self.parameter}.{self.expert}"

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The matrix as a view into its parameter; a copy where transposed experts are pooled."""
        if self.pooled:
            return (parameter.mT if self.transposed else parameter).reshape(self.rows, self.columns)
        if self.transposed:
            return parameter.mT
        return parameter if self.expert is None else parameter[self.expert]


@dataclass(frozen=True)
class Unheld:
    """A weight that is no matrix of this kind, with the reason.

    Attributes:
        parameter: name in the module tree.
        kind: class name of its module.
        reason: why it cannot be compressed as a layer.
        share: of the parameters of the part that was searched.
    """

    parameter: str
    kind: str
    reason: str
    share: float


@dataclass(frozen=True)
class Found:
    """All weights of one part of a model with two or more dimensions."""

    matrices: tuple[Matrix, ...]
    unheld: tuple[Unheld, ...]


def find_matrices(model: Any, part: str, checkpoint: Checkpoint, *, dense: bool = False) -> Found:
    """The matrices inside one module (``part``), by what the modules are and how the weights lie on disk.

    Args:
        dense: whether they stay plain floats, so that one that lies transposed counts as well.
    """
    root = model.get_submodule(part)
    total = sum(parameter.numel() for parameter in root.parameters()) or 1
    on_disk: dict[str, list[str]] = {}
    for name in checkpoint.names_of(part):
        on_disk.setdefault(checkpoint.target[name], []).append(name)
    matrices: list[Matrix] = []
    unheld: list[Unheld] = []
    for path, module in root.named_modules():
        module_name = f"{part}.{path}".rstrip(".")
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            name = f"{module_name}.{leaf}"
            kind = type(module).__name__
            files = tuple(sorted(on_disk.get(name, ())))
            if dense and isinstance(module, Conv1D) and _as_it_is(parameter, files, checkpoint):
                columns, rows = parameter.shape
                matrices.append(Matrix(module_name, name, None, kind, rows, columns, files, transposed=True))
                continue
            reason = _reason(module, parameter, files, checkpoint)
            if reason:
                unheld.append(Unheld(name, kind, reason, parameter.numel() / total))
            elif parameter.dim() == 2:
                rows, columns = parameter.shape
                matrices.append(Matrix(module_name, name, None, kind, rows, columns, files))
            else:
                matrices += _experts(module_name, name, kind, parameter, files)
    return Found(tuple(matrices), tuple(unheld))


def outside(module: nn.Module, name: str, checkpoint: Checkpoint) -> Matrix:
    """A linear layer or an embedding outside the blocks, which a user asked for."""
    weight = f"{name}.weight"
    rows, columns = module.get_parameter("weight").shape
    files = tuple(disk for disk in checkpoint.names if checkpoint.target[disk] == weight)
    return Matrix(name, weight, None, type(module).__name__, rows, columns, files)


def _reason(
    module: nn.Module, parameter: torch.Tensor, files: tuple[str, ...], checkpoint: Checkpoint
) -> str:
    """Why a weight cannot be compressed as matrices; empty where it can."""
    if isinstance(module, nn.Linear) and parameter.dim() == 2:
        if parameter.shape[0] == 1:
            return "has a single output row"
        if _as_it_is(parameter, files, checkpoint):
            return ""
        return "is converted while transformers loads it, so a packed copy would not be found"
    if parameter.dim() == 3:
        plain = [name for name in files if name.endswith(".weight") and len(checkpoint.shape(name)) == 2]
        if files and len(plain) == len(files) and len(files) % parameter.shape[0] == 0:
            return ""
        return "holds all experts in one tensor on disk, not one linear layer each"
    return f"is held by a {type(module).__name__}, not by a linear layer"


def _as_it_is(parameter: torch.Tensor, files: tuple[str, ...], checkpoint: Checkpoint) -> bool:
    """Whether a parameter is one tensor on disk, of the same shape."""
    return len(files) == 1 and checkpoint.shape(files[0]) == tuple(parameter.shape)


def _experts(
    module: str, name: str, kind: str, parameter: torch.Tensor, files: tuple[str, ...]
) -> list[Matrix]:
    experts, rows, columns = parameter.shape
    return [Matrix(module, name, expert, kind, rows, columns, files) for expert in range(experts)]
