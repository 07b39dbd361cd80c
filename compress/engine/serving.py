"""Whether an engine that serves models loads an artifact, from its configuration and headers alone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.core.artifact import Artifact
from compress.core.errors import CompressError

if TYPE_CHECKING:
    import torch

    from compress.core.scheme import Activations, Scheme
    from compress.formats.vllm import Served, Storage
    from compress.models.headers import Tensor

_LOOKUPS = ("embed_tokens", "wte", "word_embeddings")
"""Last parts of the names of embeddings."""


def vllm_document(artifact: Artifact) -> dict[str, Any] | None:
    """What vLLM makes of a quantized artifact, for people and for programs.

    Returns:
        ``loads``, the least release with what asks for it, objections with their reasons, and over how many
        GPUs the matrices can be divided; ``None`` where nothing is quantized in a format that vLLM reads.
    """
    quantization = artifact.config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return None
    method = quantization.get("quant_method")
    if method not in ("compressed-tensors", "gptq", "awq"):
        return None
    from compress.formats.gptq import checkpoint_format
    from compress.formats.vllm import judge
    from compress.models.headers import read_model

    storage: Storage = "awq" if method == "awq" else "compressed-tensors"
    if method == "gptq":
        storage = "gptq_v2" if checkpoint_format(quantization) == "gptq_v2" else "gptq"
    tensors = read_model(artifact.path)
    try:
        served = _served(tensors, storage, quantization)
    except CompressError as error:
        return {"loads": "unknown", "unknown": [error.message]}
    names = {matrix.name for matrix in served}
    floats = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")} - names
    verdict = judge(served, floats, storage, rules=bool(quantization.get("dynamic")))
    document: dict[str, Any] = {
        "loads": "unknown" if verdict.unknown and not verdict.objections else verdict.holds,
        "least_version": verdict.least_version,
        "needs": [{"release": str(demand)} for demand in verdict.demands],
        "tensor_parallel": list(verdict.splits),
    }
    if verdict.objections:
        document["objections"] = [{"layer": str(objection)} for objection in verdict.objections]
    if verdict.unknown:
        document["unknown"] = list(verdict.unknown)
    return document


def _served(
    tensors: "Mapping[str, Tensor]", storage: "Storage", quantization: Mapping[str, Any]
) -> "list[Served]":
    """Every quantized matrix.

    Raises:
        CompressError: one is stored in a way that nothing is known about.
    """
    from compress.formats.vllm import Served

    if storage == "compressed-tensors":
        found = _of_compressed_tensors(tensors, quantization)
    else:
        found = _of_checkpoint(tensors, quantization, awq=storage == "awq")
    return [
        Served(name, rows, columns, scheme, ".experts." in name, name.rpartition(".")[2] in _LOOKUPS)
        for name, (scheme, (rows, columns)) in found.items()
    ]


def _of_compressed_tensors(
    tensors: "Mapping[str, Tensor]", quantization: Mapping[str, Any]
) -> "dict[str, tuple[Scheme, tuple[int, int]]]":
    from compress.formats.compressed_tensors import UnknownStorage, float_scheme_of, scheme_of
    from compress.models.integers import integer_matrices

    groups = (quantization.get("config_groups") or {}).values()
    inputs = [group["input_activations"] for group in groups if group.get("input_activations")]
    if inputs and len(inputs) < len(groups):
        raise UnknownStorage("some layers quantize their inputs and others do not")
    found = {}
    for stem, names in integer_matrices(tensors).items():
        headers = {local: _header(tensors[name], local == "weight_shape") for local, name in names.items()}
        try:
            scheme, shape = scheme_of(headers, stem)
        except UnknownStorage:
            scheme, shape = float_scheme_of(headers, stem)
        found[stem] = _with_inputs(scheme, inputs), shape
    return found


def _with_inputs(scheme: "Scheme", inputs: Sequence[Mapping[str, Any]]) -> "Scheme":
    """The scheme with what happens to the inputs, as the first group of the configuration says it."""
    from compress.formats.compressed_tensors import UnknownStorage

    if not inputs:
        return scheme
    activations: Activations = "dynamic" if inputs[0].get("dynamic") is True else "static"
    try:
        return replace(scheme, activations=activations)
    except ValueError as error:
        raise UnknownStorage(str(error)) from error


def _of_checkpoint(
    tensors: "Mapping[str, Tensor]", quantization: Mapping[str, Any], *, awq: bool
) -> "dict[str, tuple[Scheme, tuple[int, int]]]":
    from compress.core.scheme import Scheme
    from compress.formats.gptq import scheme_of

    found = {}
    for name, entry in tensors.items():
        if not name.endswith(".qweight"):
            continue
        stem = name.removesuffix(".qweight")
        if awq:
            bits, group = int(quantization.get("bits", 4)), int(quantization.get("group_size", 128))
            columns, rows = entry.shape[0], entry.shape[1] * 32 // bits
            found[stem] = Scheme(bits, None if group == -1 else group, False), (rows, columns)
        else:
            # Without the index: an activation order is nothing to vLLM.
            parts = {part: tensors[f"{stem}.{part}"] for part in ("qweight", "qzeros", "scales")}
            headers = {part: _header(tensor) for part, tensor in parts.items()}
            found[stem] = scheme_of(headers, stem, quantization)
    return found


def _header(entry: "Tensor", value: bool = False) -> "torch.Tensor":
    """A tensor of the shape and type that a header tells of; with its value where that is asked for."""
    import torch

    from compress.models.checkpoint import DTYPES

    dtype = DTYPES.get(entry.dtype, torch.uint8)
    if not value:
        return torch.empty(entry.shape, dtype=dtype, device="meta")
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        raw = bytearray(stream.read(entry.end - entry.start))
    return torch.frombuffer(raw, dtype=dtype).reshape(entry.shape)
