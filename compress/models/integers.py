"""Which tensors on disk make up quantized matrices, and to which module each matrix belongs."""

from collections.abc import Iterable
from typing import Any, Final

from torch import nn

from compress.models.checkpoint import Checkpoint

PARTS: Final = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
)
"""Local names of the tensors that one packed matrix consists of on disk."""


def integer_matrices(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Which tensors on disk make up quantized matrices.

    Returns:
        For each stem (``model.layers.0.mlp.up_proj``), local name to name on disk. A matrix is told by a
        ``weight_scale`` beside ``weight_packed`` or beside an integer ``weight``.
    """
    known = set(names)
    stems = sorted(name.removesuffix(".weight_scale") for name in known if name.endswith(".weight_scale"))
    return {
        stem: {part: f"{stem}.{part}" for part in ("weight", *PARTS) if f"{stem}.{part}" in known}
        for stem in stems
    }


def module_of(model: Any, checkpoint: Checkpoint, stem: str) -> str | None:
    """The module with a weight that a quantized matrix belongs to.

    Returns:
        Its name; ``None`` where transformers fuses the matrix with others (experts), so that it is the
        weight of no module of its own.
    """
    begins = (f"{stem}.weight", f"{stem}.qweight")
    any_name = next(name for name in checkpoint.names if name.startswith(begins))
    local = any_name.removeprefix(f"{stem}.")
    target = checkpoint.target[any_name].removesuffix(f".{local}")
    prefix = f"{model.base_model_prefix}."
    for candidate in (target, stem, f"{prefix}{stem}", stem.removeprefix(prefix)):
        try:
            module = model.get_submodule(candidate)
        except AttributeError:
            continue
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            return candidate
    return None
