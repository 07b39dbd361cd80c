"""How large a model is on disk, as a whole and by part.

Read from headers alone. A part is found from the structure of the model, not from names: what lies inside
a block is attention if a module of attention holds it, else the block's feed-forward part; what lies
outside is an embedding, the head, or other. Bits a parameter count everything that is stored for it:
scales, zero points and shapes too. A tied head is stored once, with the embedding.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, final

from safetensors import safe_open
from torch import nn

from compress.bench.metrics import Metric, Quantity, Stage, Subject
from compress.core.artifact import Artifact
from compress.core.errors import CompressError
from compress.core.facts import Fact
from compress.core.measurement import Measurement
from compress.models.blocks import find_blocks
from compress.models.checkpoint import Checkpoint
from compress.models.headers import Tensor, read_model
from compress.models.load import skeleton

PARTS: Final = ("embeddings", "attention", "mlp", "norm", "head", "other")
BYTES = Quantity("size.bytes", "weights on disk", "B", "lower")
PARAMETERS = Quantity("size.parameters", "parameters", "", "lower")
BITS = Quantity("size.bits_per_parameter", "bits a parameter", "bit", "lower")
PART_BITS = {
    part: Quantity(
        f"size.{part}_bits_per_parameter", f"bits a parameter, {part}", "bit", "lower", shown=False
    )
    for part in PARTS
}
_ACCOMPANYING: Final = ("_global_scale", "_scale", "_zero_point", "_shape", "_g_idx")
"""Ends of the names of tensors that belong to a quantized weight and are no parameters themselves."""
_NF4_STATE: Final = ".quant_state.bitsandbytes__nf4"
"""What bitsandbytes stores beside a weight of two numbers a byte."""
_OF_INPUTS: Final = ("input_scale", "input_global_scale")
"""Fixed scales of a layer's inputs."""
_INT8_PARTS: Final = ("SCB", "weight_format")
"""What it stores beside a weight of 8 bits."""


@final
class Size(Metric):
    """Bytes, parameters and bits a parameter."""

    title = "size"
    stage = Stage.FILES
    quantities = (BYTES, PARAMETERS, BITS, *PART_BITS.values())

    def measure(self, subject: Subject) -> dict[str, Measurement]:
        """From the headers of the weight files and the structure of the model."""
        artifact = subject.artifact
        found = {BYTES.name: BYTES.exact(sum(file.stat().st_size for file in artifact.weight_files))}
        if Fact.TRANSFORMERS not in artifact.facts:
            reason = "parameters are counted in safetensors files alone"
            return {**self.missing(reason), **found}
        stored = _stored(artifact)
        parameters = sum(count for _, count in stored.values())
        stored_bytes = sum(size for size, _ in stored.values())
        found[PARAMETERS.name] = PARAMETERS.exact(parameters)
        found[BITS.name] = _bits(BITS, stored_bytes, parameters)
        try:
            parts = _parts(artifact, subject.task.name, trust_remote_code=subject.options.trust_remote_code)
        except CompressError as error:
            return {**{q.name: q.missing(error.message) for q in PART_BITS.values()}, **found}
        for part, quantity in PART_BITS.items():
            inside = [stored[name] for name, its_part in parts.items() if its_part == part]
            size, count = sum(size for size, _ in inside), sum(count for _, count in inside)
            found[quantity.name] = _bits(quantity, size, count)
        return found


def measure_size(
    artifact: Artifact, *, task: str = "auto", trust_remote_code: bool = False
) -> dict[str, Any]:
    """The sizes of an artifact as plain data: bytes, parameters, bits a parameter, and the same by part.

    Where the structure cannot be found (the task is unknown), ``parts`` is absent and ``note`` says why.
    """
    document: dict[str, Any] = {"bytes": sum(file.stat().st_size for file in artifact.weight_files)}
    if Fact.TRANSFORMERS not in artifact.facts:
        return document
    stored = _stored(artifact)
    parameters = sum(count for _, count in stored.values())
    document["parameters"] = parameters
    document["bits_per_parameter"] = _ratio(sum(size for size, _ in stored.values()), parameters)
    try:
        parts = _parts(artifact, task, trust_remote_code=trust_remote_code)
    except CompressError as error:
        document["note"] = error.message
        return document
    document["parts"] = {}
    for part in PARTS:
        inside = [stored[name] for name, its_part in parts.items() if its_part == part]
        if inside:
            size, count = sum(size for size, _ in inside), sum(count for _, count in inside)
            document["parts"][part] = {
                "bytes": size,
                "parameters": count,
                "bits_per_parameter": _ratio(size, count),
            }
    return document


def _ratio(size: int, count: int) -> float | None:
    return round(8 * size / count, 4) if count else None


def _bits(quantity: Quantity, size: int, count: int) -> Measurement:
    if not count:
        return quantity.missing("the model has no such part")
    return quantity.exact(8 * size / count)


def _stored(artifact: Artifact) -> dict[str, tuple[int, int]]:
    """Bytes and parameters of every tensor on disk."""
    tensors = read_model(artifact.path)
    return {
        name: (tensor.end - tensor.start, _parameters(name, tensor, tensors))
        for name, tensor in tensors.items()
    }


def _parameters(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> int:
    stem, _, local = name.rpartition(".")
    if name + _NF4_STATE in tensors:
        return 2 * math.prod(tensor.shape)
    weight, hangs_on, _ = name.partition(".weight.")
    if (hangs_on and f"{weight}.weight{_NF4_STATE}" in tensors) or (
        local in _INT8_PARTS and f"{stem}.SCB" in tensors and f"{stem}.weight" in tensors
    ):
        return 0
    if local.endswith("_packed"):
        shape = tensors.get(f"{stem}.{local.removesuffix('_packed')}_shape")
        if shape is not None:
            return math.prod(_integers(shape.file, shape.name))
        # 4-bit floats lie two a byte, and need no shape.
        return math.prod(tensor.shape) * (2 if tensor.dtype == "U8" else 1)
    if local in _OF_INPUTS and f"{stem}.weight_scale" in tensors:
        return 0
    owner = next((local.removesuffix(end) for end in _ACCOMPANYING if local.endswith(end)), None)
    if owner and (f"{stem}.{owner}" in tensors or f"{stem}.{owner}_packed" in tensors):
        return 0
    return math.prod(tensor.shape)


def _integers(file: Path, name: str) -> list[int]:
    with safe_open(file, framework="pt") as opened:
        values: list[int] = opened.get_tensor(name).tolist()
    return values


def _parts(artifact: Artifact, task: str, *, trust_remote_code: bool) -> dict[str, str]:
    """The part of every tensor on disk, from where its module sits in the model."""
    model = skeleton(artifact, task=task, trust_remote_code=trust_remote_code)
    target = Checkpoint(artifact, model).target
    modules = dict(model.named_modules())
    blocks = {block.name for block in find_blocks(model)}
    head = model.get_output_embeddings()
    return {name: _part(where.rpartition(".")[0], modules, blocks, head) for name, where in target.items()}


def _part(path: str, modules: Mapping[str, nn.Module], blocks: set[str], head: nn.Module | None) -> str:
    module = modules.get(path)
    kind = type(module).__name__ if module is not None else ""
    if "Norm" in kind:
        return "norm"
    steps = path.split(".")
    above = [".".join(steps[: end + 1]) for end in range(len(steps))]
    block = next((name for name in above if name in blocks), None)
    if block is not None:
        # Every attention of transformers is a module whose class says so; the layers in it do not.
        inside = [
            type(modules[name]).__name__ for name in above if name in modules and len(name) > len(block)
        ]
        return "attention" if any("Attention" in name for name in inside) else "mlp"
    if module is head and head is not None:
        return "head"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    return "head" if isinstance(module, nn.Linear) else "other"
