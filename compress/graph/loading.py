"""The model of an artifact in float32, with the integers that its quantized matrices were stored as."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.core.artifact import Artifact
from compress.core.errors import ModelError, PlanError
from compress.formats.compressed_tensors import UnknownStorage, holds_floats, quantizes_inputs, read_matrix
from compress.formats.matmul_nbits import obstacle
from compress.models.checkpoint import Checkpoint
from compress.models.integers import integer_matrices, module_of
from compress.models.load import skeleton
from compress.models.tasks import Task
from compress.numerics.affine import Quantized

_UNREAD = "pooler"
"""A part that no task's outputs read: encoders trained with another head come without it."""


@dataclass(frozen=True)
class Loaded:
    """A model in memory.

    Attributes:
        model: every weight a float32, quantized ones as exactly ``(q - zero) * scale``: not rounded once
            more to the dtype in which the scales are stored, as a loader that makes them dense does.
        matrices: the integers of the linear layers that an operator on integers can hold, by module.
        dense: quantized modules that no such operator holds, with the reason; they are floats in a graph.
    """

    model: Any
    matrices: dict[str, Quantized]
    dense: dict[str, str]


def check_storage(source: Artifact) -> None:
    """Refuse an artifact whose weights cannot be read.

    Raises:
        PlanError: it is quantized in another format than compressed-tensors, quantizes its inputs, or holds
            small floats.
    """
    quantization = source.config.get("quantization_config")
    if quantization is not None and quantizes_inputs(quantization):
        raise PlanError(
            f"{source.path} quantizes the inputs of its layers, and an exported graph would not",
            "export the float model, or one whose weights alone are quantized (--activations none)",
        )
    if quantization is not None and holds_floats(quantization):
        raise PlanError(
            f"{source.path} holds its weights as small floats, which are not exported",
            "export the float model, or one whose weights are integers",
        )
    if quantization is not None and quantization.get("quant_method") != "compressed-tensors":
        raise PlanError(
            f"{source.path} is stored as '{quantization.get('quant_method')}', which is not exported",
            "export the float model, or one that a quantize pass made",
        )


def fused(stem: str) -> PlanError:
    """What to say of a quantized matrix that is no module's own weight."""
    return PlanError(
        f"'{stem}' is one of several experts that transformers fuses; no operator takes their integers",
        "export the model as it was before it was quantized",
    )


def load(source: Artifact, task: Task, *, trust_remote_code: bool = False) -> Loaded:
    """Bring an artifact into memory, all of it.

    Raises:
        PlanError: the artifact is stored in a way that cannot be exported.
        ModelError: the artifact is damaged.
    """
    check_storage(source)
    device = torch.device("cpu")
    model = skeleton(source, task=task.name, dtype=torch.float32, trust_remote_code=trust_remote_code)
    if getattr(model.config, "_experts_implementation", None) is not None:
        # A loop over those experts that some token chose depends on the data; a graph computes all of them.
        model.set_experts_implementation("batched_mm")
    checkpoint = Checkpoint(source, model)
    stems = integer_matrices(checkpoint.names)
    taken = {name for names in stems.values() for name in names.values()}
    checkpoint.load([name for name in checkpoint.names if name not in taken], device)
    loaded = Loaded(model, {}, {})
    for stem, names in stems.items():
        _place(loaded, checkpoint, stem, names)
    model.tie_weights()
    if getattr(model, _UNREAD, None) is not None and not task.generates:
        setattr(model, _UNREAD, _filled(getattr(model, _UNREAD)))
    checkpoint.require_filled("")
    return Loaded(model.eval().requires_grad_(False), loaded.matrices, loaded.dense)


def _place(loaded: Loaded, checkpoint: Checkpoint, stem: str, names: dict[str, str]) -> None:
    """Put one quantized matrix into its module as floats, and remember its integers."""
    try:
        matrix = read_matrix({local: checkpoint.tensor(name) for local, name in names.items()}, stem)
    except UnknownStorage as error:
        raise PlanError(f"{error.message}, which is not exported") from error
    name = module_of(loaded.model, checkpoint, stem)
    if name is None:
        raise fused(stem)
    module = loaded.model.get_submodule(name)
    if tuple(module.weight.shape) != matrix.shape:
        raise ModelError(
            f"'{name}' is {list(matrix.shape)} on disk, the model wants {list(module.weight.shape)}"
        )
    exact = Quantized(matrix.q, matrix.scale.float(), matrix.zero, matrix.scheme)
    module.weight = nn.Parameter(exact.dequantize(), requires_grad=False)
    reason = f"a {type(module).__name__}" if type(module) is not nn.Linear else None
    reason = reason or obstacle(matrix.scheme.group_size, matrix.columns)
    if reason is None:
        loaded.matrices[name] = matrix
    else:
        loaded.dense[name] = reason


def _filled(module: nn.Module) -> nn.Module | None:
    """The module, or none where no file fills it."""
    return None if any(parameter.device.type == "meta" for parameter in module.parameters()) else module
