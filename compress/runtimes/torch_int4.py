"""The model on real integer kernels: packed int4 and int8 matrix products that torch itself carries.

Stock transformers runs a compressed-tensors model dense; here its linear layers stay packed in memory and
run on aten's kernels. The model is never dense as a whole: layer after layer is read, packed for the
kernel and dropped. A layer that no kernel takes is dequantized alone, and the session's facts name it.
"""

from collections import Counter
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from compress.core.artifact import Artifact
from compress.core.errors import ModelError
from compress.core.facts import Fact
from compress.core.scheme import Scheme
from compress.formats.compressed_tensors import UnknownStorage, quantizes_inputs, read_matrix
from compress.models.checkpoint import Checkpoint
from compress.models.integers import integer_matrices, module_of
from compress.models.load import loaded_dtype, skeleton
from compress.models.tasks import Task
from compress.numerics.affine import Quantized
from compress.runtimes import Placement, Runtime, Session, Unavailable
from compress.runtimes._packed import KERNEL_DTYPE, check_product, obstacle, pack
from compress.runtimes._session import TorchSession, chosen_device


@final
class TorchInt4(Runtime):
    """Packed int4 and int8 linear layers."""

    name = "torch-int4"
    title = "torch's packed int4 and int8 kernels"
    loads = Fact.TRANSFORMERS

    def prepared(
        self, artifact: Artifact, task: Task, folder: Path, *, trust_remote_code: bool = False
    ) -> Path:
        """See `Runtime.prepared`: it loads what is there."""
        return artifact.path

    def load(self, artifact: Artifact, task: Task, placement: Placement) -> Session:
        """See `Runtime.load`."""
        quantization = artifact.config.get("quantization_config")
        if quantization is None:
            raise Unavailable("the model holds no integer weights")
        if quantization.get("quant_method") != "compressed-tensors":
            raise Unavailable(f"torch-int4 does not read '{quantization.get('quant_method')}' models")
        if quantizes_inputs(quantization):
            raise Unavailable("the model quantizes its inputs, and the kernels here take them as floats")
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
            tensors = {local: self._checkpoint.tensor(name) for local, name in names.items()}
            try:
                matrix = read_matrix(tensors, stem)
            except UnknownStorage as error:
                raise Unavailable(f"{error.message}, which no kernel here runs") from error
            self._place(modules[stem], matrix)
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
        module = module_of(self._model, self._checkpoint, stem)
        if module is None:
            raise Unavailable(f"'{stem}' is no layer of its own in transformers (fused experts)")
        return module

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
