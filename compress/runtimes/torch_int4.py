"""The model on real integer kernels: packed int4 and int8 matrix products that torch itself carries.

Stock transformers runs a compressed-tensors model dense; here its linear layers stay packed in memory and
run on aten's kernels. The model is never dense as a whole: layer after layer is read, packed for the
kernel and dropped. A layer that no kernel takes is dequantized alone, and the session's facts name it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final, final

import torch
from torch import nn

from compress.core.artifact import Artifact
from compress.core.errors import ModelError
from compress.core.scheme import Scheme
from compress.formats.compressed_tensors import read_quantized
from compress.models.checkpoint import Checkpoint
from compress.models.load import loaded_dtype, skeleton
from compress.models.tasks import Task
from compress.numerics.affine import Quantized
from compress.runtimes import Placement, Runtime, Session, Unavailable
from compress.runtimes._packed import KERNEL_DTYPE, check_product, obstacle, pack
from compress.runtimes._session import TorchSession, chosen_device

PARTS: Final = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
"""Local names of the tensors that one packed matrix consists of on disk."""


@final
class TorchInt4(Runtime):
    """Packed int4 and int8 linear layers."""

    name = "torch-int4"
    title = "torch's packed int4 and int8 kernels"

    def load(self, artifact: Artifact, task: Task, placement: Placement) -> Session:
        """See `Runtime.load`."""
        quantization = artifact.config.get("quantization_config")
        if quantization is None:
            raise Unavailable("the model holds no integer weights")
        if quantization.get("quant_method") != "compressed-tensors":
            raise Unavailable(f"torch-int4 does not read '{quantization.get('quant_method')}' models")
        device = chosen_device(placement.device)
        dtype = loaded_dtype(artifact) if placement.dtype == "auto" else getattr(torch, placement.dtype)
        model = skeleton(artifact, task=task.name, dtype=dtype, trust_remote_code=placement.trust_remote_code)
        facts = _Packing(model, Checkpoint(artifact, model), device, dtype).run()
        return TorchSession(model.eval(), task, facts)


@final
class _Packing:
    """Brings one artifact into a skeleton, packed."""

    def __init__(self, model: Any, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype
        self._checked: set[tuple[str, Scheme]] = set()
        self._kernels: Counter[str] = Counter()
        self._dense: dict[str, str] = {}

    def run(self) -> dict[str, Any]:
        matrices = integer_matrices(self._checkpoint.names)
        taken = {name for names in matrices.values() for name in names.values()}
        modules = {stem: self._module_of(stem) for stem in matrices}
        self._checkpoint.load([n for n in self._checkpoint.names if n not in taken], self._device)
        for stem, names in matrices.items():
            self._place(modules[stem], read_matrix(self._checkpoint, names))
        self._model.tie_weights()
        self._checkpoint.require_filled("")
        # What is in no file was computed with the skeleton, on the CPU.
        self._model.to(self._device)
        if not self._kernels:
            reasons = Counter(self._dense.values()).most_common(1)
            raise Unavailable(
                f"none of {len(self._dense)} quantized layers fits torch's kernels: {reasons[0][0]}"
                if reasons
                else "the model holds no integer weights"
            )
        return {
            "kernels": dict(self._kernels),
            "kernel_dtype": str(KERNEL_DTYPE).removeprefix("torch."),
            "dense_layers": dict(sorted(self._dense.items())),
        }

    def _module_of(self, stem: str) -> str:
        """The module that a packed matrix belongs to.

        Raises:
            Unavailable: none; transformers fuses it with others (experts), which no kernel here runs.
        """
        any_name = next(n for n in self._checkpoint.names if n.startswith(f"{stem}.weight"))
        local = any_name.removeprefix(f"{stem}.")
        target = self._checkpoint.target[any_name].removesuffix(f".{local}")
        prefix = f"{self._model.base_model_prefix}."
        for candidate in (target, stem, f"{prefix}{stem}", stem.removeprefix(prefix)):
            try:
                module = self._model.get_submodule(candidate)
            except AttributeError:
                continue
            if isinstance(getattr(module, "weight", None), nn.Parameter):
                return candidate
        raise Unavailable(f"'{stem}' is no layer of its own in transformers (fused experts)")

    def _place(self, name: str, matrix: Quantized) -> None:
        module = self._model.get_submodule(name)
        if tuple(module.weight.shape) != matrix.shape:
            raise ModelError(
                f"'{name}' is {list(matrix.shape)} on disk, the model wants {list(module.weight.shape)}"
            )
        reason = f"a {type(module).__name__}" if type(module) is not nn.Linear else None
        reason = reason or obstacle(matrix, self._device)
        if reason is not None:
            dense = matrix.dequantize().to(device=self._device, dtype=self._dtype)
            module.weight = nn.Parameter(dense, requires_grad=False)
            self._dense[name] = reason
            return
        layer = pack(matrix, module.bias, self._device, self._dtype)
        if (layer.kernel, matrix.scheme) not in self._checked:
            check_product(layer, matrix, self._device)
            self._checked.add((layer.kernel, matrix.scheme))
        self._model.set_submodule(name, layer)
        self._kernels[layer.kernel] += 1


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


def read_matrix(checkpoint: Checkpoint, names: Mapping[str, str]) -> Quantized:
    """One matrix from disk. Its scheme is told by the tensors themselves.

    The number of bits is that which makes the packed width out of the width; the group is the width by
    the number of scales; a zero point makes it asymmetric.

    Raises:
        ModelError: the tensors contradict each other.
        Unavailable: the matrix is stored in a way that is not integers with scales.
    """
    tensors = {local: checkpoint.tensor(name) for local, name in names.items()}
    stem = names["weight_scale"].removesuffix(".weight_scale")
    if "weight_g_idx" in tensors:
        raise Unavailable(f"'{stem}' is stored with an activation order, which no kernel here follows")
    scale = tensors["weight_scale"]
    scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    tensors["weight_scale"] = scale
    if "weight_packed" in tensors and "weight_shape" in tensors:
        rows, columns = (int(size) for size in tensors["weight_shape"])
        words = tensors["weight_packed"].shape[-1]
        bits = next((b for b in range(1, 9) if -(-columns * b // 32) == words), 0)
        if not bits or tensors["weight_packed"].shape[0] != rows:
            raise ModelError(
                f"'{stem}': {words} packed words do not make {columns} columns", "make the artifact again"
            )
        return read_quantized(
            tensors, _scheme(bits, columns, scale, symmetric="weight_zero_point" not in tensors)
        )
    weight = tensors.get("weight")
    if weight is None or weight.dtype != torch.int8 or scale.shape[0] != weight.shape[0]:
        stored = "nothing known" if weight is None else f"{weight.dtype} and scales {list(scale.shape)}"
        raise Unavailable(f"'{stem}' is stored as {stored}, which no kernel here runs")
    zero = tensors.get("weight_zero_point")
    scheme = _scheme(8, weight.shape[1], scale, symmetric=zero is None)
    return Quantized(
        weight, scale, None if zero is None else zero.reshape(scale.shape).to(torch.int8), scheme
    )


def _scheme(bits: int, columns: int, scale: torch.Tensor, *, symmetric: bool) -> Scheme:
    groups = scale.shape[1]
    return Scheme(bits, None if groups == 1 else columns // groups, symmetric)
