"""The compressed-tensors format in its layouts: what transformers and vLLM load.

- ``pack-quantized``: integers. ``weight_packed`` (int32 words along the input, little end first, each value
  offset by ``2^(b-1)`` to be unsigned), ``weight_scale`` ``[rows, groups]``, ``weight_shape``, and for
  asymmetric schemes ``weight_zero_point`` packed along the rows. Packing is the library's own.
- ``int-quantized`` and ``float-quantized``: 8-bit weights beside quantized inputs. ``weight`` as int8 or
  E4M3, ``weight_scale`` ``[rows, 1]``, and for inputs with a fixed scale ``input_scale`` ``[1]``. 8-bit
  floats without quantized inputs lie the same way and are called ``naive-quantized``.
- ``nvfp4-pack-quantized`` and ``mxfp4-pack-quantized``: ``weight_packed`` with two 4-bit floats a byte, the
  first in the low half, and ``weight_scale`` as E4M3 with a float32 ``weight_global_scale`` ``[1]`` that
  scales are *divided* by, or as exponents (uint8); for inputs of ``nvfp4``, ``input_global_scale`` ``[1]``.

https://github.com/vllm-project/compressed-tensors
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, final

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from compress.core.errors import CompressError, ModelError
from compress.core.scheme import FLOAT_LAYOUTS, Activations, Format, Scheme
from compress.formats.weight_format import Held, WeightFormat
from compress.numerics.affine import Quantized
from compress.numerics.floats import E4M3, QuantizedFloats, pack_nibbles, unpack_nibbles

INPUT_SCALE: Final = "input_scale"
"""The part of a matrix that is the fixed scale of its inputs, once for every row."""
_SUFFIX = ".weight"
_HOLDS = ("Linear", "Embedding")
_FLOAT_PACKINGS: Final[Mapping[Format, str]] = {
    "fp8": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
}


def quantizes_inputs(quantization: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` says that inputs or outputs of layers are rounded too."""
    groups = (quantization.get("config_groups") or {}).values()
    parts = ("input_activations", "output_activations")
    return any(isinstance(group, Mapping) and bool(group.get(part)) for group in groups for part in parts)


def holds_floats(quantization: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` says that some weights are small floats."""
    groups = (quantization.get("config_groups") or {}).values()
    weights = [group.get("weights") for group in groups if isinstance(group, Mapping)]
    return any(isinstance(entry, Mapping) and entry.get("type") == "float" for entry in weights)


def packing_of(scheme: Scheme) -> str:
    """What the library calls the layout in which a matrix of this scheme is stored."""
    if scheme.integers:
        return "pack-quantized" if scheme.activations == "none" else "int-quantized"
    if scheme.format == "fp8" and scheme.activations == "none":
        return "naive-quantized"
    return _FLOAT_PACKINGS[scheme.format]


@final
class CompressedTensors(WeightFormat):
    """Integers of 2 to 8 bits and small floats with one scale a group, in safetensors."""

    name = "compressed-tensors"

    def refusal(self, held: Held) -> str | None:
        """Only linear layers, embeddings and experts that are linear layers on disk can be held.

        Anything else (GPT-2's Conv1D) would load in stock transformers without an error and with random
        weights.
        """
        if not held.expert and held.kind not in _HOLDS:
            return f"compressed-tensors cannot hold a {held.kind}"
        if held.expert and not held.scheme.symmetric:
            return "transformers reads packed experts without zero points; use a symmetric scheme"
        plain = held.scheme.integers and held.scheme.activations == "none"
        if held.expert and not plain:
            return "transformers reads experts as integers alone and leaves their inputs as they are"
        if held.kind == "Embedding" and not plain:
            return "an embedding is looked up and not multiplied, so it is held as integers alone"
        return None

    def refusal_together(self, held: Sequence[Held]) -> str | None:
        """What stock transformers cannot tell apart.

        It unpacks all experts with one scheme. Asymmetric layers and embeddings it can only load by
        dequantizing them, and then it unpacks every layer with one scheme.
        """
        experts = {entry.scheme for entry in held if entry.expert}
        if len(experts) > 1:
            return f"transformers reads all experts with one scheme, and they have {_listed(experts)}"
        schemes = {entry.scheme for entry in held}
        if len(schemes) > 1 and _dense_only(held):
            return (
                "transformers reads a model with asymmetric layers or embeddings with one scheme, and it has "
                + _listed(schemes)
            )
        return None

    def encode(
        self, weight: str, parts: Mapping[str, torch.Tensor], scheme: Scheme
    ) -> dict[str, torch.Tensor]:
        """The tensors of the scheme's layout; the module's docstring lists them."""
        if not weight.endswith(_SUFFIX):
            raise ModelError(f"'{weight}' does not end in '{_SUFFIX}', so the format has no name for it")
        stem = weight.removesuffix(_SUFFIX)
        local = _packed(parts, scheme) if packing_of(scheme) == "pack-quantized" else _plain(parts, scheme)
        return {f"{stem}.{name}": tensor.contiguous() for name, tensor in local.items()}

    def encoded_bytes(self, held: Held, scale_bytes: int) -> int:
        """Packed words, scales, the shape, and zero points; of other layouts numbers, scales, and those of
        inputs."""
        if packing_of(held.scheme) != "pack-quantized":
            return _plain_bytes(held, scale_bytes)
        words = held.rows * -(-held.columns * held.scheme.bits // 32)
        groups = held.scheme.groups(held.columns)
        zeros = 0 if held.scheme.symmetric else -(-held.rows * held.scheme.bits // 32) * groups
        return 4 * (words + zeros) + held.rows * groups * scale_bytes + 16

    def configuration(
        self, held: Sequence[Held], kept: Sequence[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """``quantization_config`` with one group a scheme; the first targets all linear layers."""
        frequent = [scheme for scheme, _ in Counter(entry.scheme for entry in held).most_common()]
        # transformers takes the first group without a regular expression for fused experts.
        experts = [entry.scheme for entry in held if entry.expert]
        if experts:
            frequent.sort(key=lambda scheme: scheme != experts[0])
        groups: dict[str, dict[str, Any]] = {}
        for index, scheme in enumerate(frequent):
            here = [entry for entry in held if entry.scheme == scheme and not entry.expert]
            # A name is matched before a class, so the other groups take their layers from the first.
            named = sorted(entry.module for entry in here if index > 0 or entry.kind != "Linear")
            targets = ["Linear"] if index == 0 else []
            if named:
                targets.append(f"re:^({'|'.join(re.escape(name) for name in named)})$")
            groups[f"group_{index}"] = {"targets": targets, **_arguments(scheme)}
        packings = [packing_of(scheme) for scheme in frequent]
        if len(set(packings)) > 1:
            for group, packing in zip(groups.values(), packings, strict=True):
                group["format"] = packing
        quantization: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": packings[0] if len(set(packings)) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted(kept),
        }
        if _dense_only(held):
            quantization["dequantize"] = True
        return {**config, "quantization_config": quantization}


def _dense_only(held: Sequence[Held]) -> bool:
    """Whether transformers has to dequantize while it loads.

    Left packed, it expects zero points unpacked and refuses the file, and it cannot initialise an
    embedding without a weight; dequantized while loading, both are read as they lie. Other readers pass
    the key over.
    """
    return any(not entry.scheme.symmetric or entry.kind == "Embedding" for entry in held)


def _listed(schemes: set[Scheme]) -> str:
    return " and ".join(sorted(str(scheme) for scheme in schemes))


def _packed(parts: Mapping[str, torch.Tensor], scheme: Scheme) -> dict[str, torch.Tensor]:
    """Integers in words, by their local names."""
    q = parts["q"]
    tensors = {
        "weight_packed": pack_to_int32(q, scheme.bits),
        "weight_scale": parts["scale"],
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if not scheme.symmetric:
        tensors["weight_zero_point"] = pack_to_int32(parts["zero"], scheme.bits, packed_dim=0)
    return tensors


def _plain(parts: Mapping[str, torch.Tensor], scheme: Scheme) -> dict[str, torch.Tensor]:
    """Numbers of 8 bits as they are and 4-bit floats two a byte, with the scale of inputs."""
    four = scheme.bits == 4
    tensors = {
        "weight_packed" if four else "weight": pack_nibbles(parts["q"]) if four else parts["q"],
        "weight_scale": parts["scale"],
    }
    if scheme.format == "nvfp4":
        tensors["weight_global_scale"] = torch.tensor([scheme.tensor_scale], dtype=torch.float32)
    if scheme.activations == "static":
        name = "input_global_scale" if scheme.format == "nvfp4" else "input_scale"
        # One number for the matrix, which came once for each of its rows.
        tensors[name] = parts[INPUT_SCALE][:1].clone()
    return tensors


def _plain_bytes(held: Held, scale_bytes: int) -> int:
    scheme = held.scheme
    scale = scale_bytes if scheme.bits == 8 else 1
    extra = 4 if scheme.format == "nvfp4" else 0
    if scheme.activations == "static":
        extra += 4 if scheme.format == "nvfp4" else scale_bytes
    numbers = held.rows * held.columns * scheme.bits // 8
    return numbers + held.rows * scheme.groups(held.columns) * scale + extra


def _arguments(scheme: Scheme) -> dict[str, Any]:
    """``weights`` and, where inputs are quantized, ``input_activations`` of a group."""
    arguments = {"weights": {**_numbers(scheme), "dynamic": False}}
    if scheme.activations != "none":
        arguments["input_activations"] = _inputs(scheme)
    return arguments


def _numbers(scheme: Scheme) -> dict[str, Any]:
    """What the library calls the numbers of a scheme."""
    strategy = "channel" if scheme.group_size is None else "group"
    numbers: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int" if scheme.integers else "float",
        "symmetric": scheme.symmetric,
        "strategy": "tensor_group" if scheme.format == "nvfp4" else strategy,
        "group_size": scheme.group_size,
    }
    if scheme.format == "nvfp4":
        numbers["scale_dtype"] = "torch.float8_e4m3fn"
    if scheme.format == "mxfp4":
        numbers["scale_dtype"] = "torch.uint8"
    return numbers


def _inputs(scheme: Scheme) -> dict[str, Any]:
    """Numbers of 8 bits with a scale a token or a tensor; 4-bit floats as those of the weights."""
    numbers = _numbers(scheme)
    if scheme.bits == 8:
        numbers["strategy"] = "token" if scheme.activations == "dynamic" else "tensor"
    # Of nvfp4 only the scale of the whole tensor is fixed.
    local = scheme.format == "nvfp4"
    return {**numbers, "dynamic": "local" if local else scheme.activations == "dynamic"}


def read_quantized(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> Quantized:
    """One matrix back from its tensors on disk, by their local names (``weight_packed``, …).

    Raises:
        ModelError: a tensor is missing.
    """
    try:
        packed, scale, shape = (tensors[f"weight_{part}"] for part in ("packed", "scale", "shape"))
        rows, columns = (int(size) for size in shape)
        q = unpack_from_int32(packed, scheme.bits, torch.Size((rows, columns)))
        zero = None
        if not scheme.symmetric:
            zero = unpack_from_int32(
                tensors["weight_zero_point"], scheme.bits, torch.Size((rows, scale.shape[-1])), packed_dim=0
            )
    except KeyError as error:
        raise ModelError(f"a packed matrix lacks {error}", "make the artifact again") from error
    return Quantized(q=q.contiguous(), scale=scale, zero=zero, scheme=scheme)


class UnknownStorage(CompressError):
    """A matrix is stored in a way that is not integers with scales."""

    exit_code = ModelError.exit_code


def read_matrix(tensors: Mapping[str, torch.Tensor], stem: str) -> Quantized:
    """One matrix from all its tensors on disk, by their local names; its scheme is told by the tensors.

    Args:
        tensors: ``weight_packed`` or an integer ``weight``, ``weight_scale``, and what belongs to them.
        stem: name of the matrix, for messages.

    Raises:
        ModelError: the tensors contradict each other.
        UnknownStorage: the matrix is stored in a way that is not integers with scales.
    """
    scheme, _ = scheme_of(tensors, stem)
    scale = _two_dimensional(tensors["weight_scale"])
    if "weight_packed" in tensors:
        return read_quantized({**tensors, "weight_scale": scale}, scheme)
    zero = tensors.get("weight_zero_point")
    zero = None if zero is None else zero.reshape(scale.shape).to(torch.int8)
    return Quantized(tensors["weight"], scale, zero, scheme)


def scheme_of(tensors: Mapping[str, torch.Tensor], stem: str) -> tuple[Scheme, tuple[int, int]]:
    """The scheme, and rows and columns, that the tensors of one matrix tell of.

    The number of bits is that which makes the packed width out of the width; the group is the width by
    the number of scales; a zero point makes it asymmetric.

    Args:
        tensors: as `read_matrix` takes them; of all but ``weight_shape`` the shape and dtype are enough, so
            they may be on the meta device.
        stem: name of the matrix, for messages.

    Raises:
        ModelError: the tensors contradict each other.
        UnknownStorage: the matrix is stored in a way that is not integers with scales.
    """
    if "weight_g_idx" in tensors:
        raise UnknownStorage(f"'{stem}' is stored with an activation order")
    scale = _two_dimensional(tensors["weight_scale"])
    symmetric = "weight_zero_point" not in tensors
    if "weight_packed" in tensors and "weight_shape" in tensors:
        rows, columns = (int(size) for size in tensors["weight_shape"])
        words = tensors["weight_packed"].shape[-1]
        bits = next((b for b in range(1, 9) if -(-columns * b // 32) == words), 0)
        if not bits or tensors["weight_packed"].shape[0] != rows:
            raise ModelError(
                f"'{stem}': {words} packed words do not make {columns} columns", "make the artifact again"
            )
        return _told(bits, columns, scale, symmetric=symmetric), (rows, columns)
    if _float_format(tensors) is not None:
        raise UnknownStorage(f"'{stem}' is stored as {_float_format(tensors)} numbers")
    weight = tensors.get("weight")
    if weight is None or weight.dtype != torch.int8 or scale.shape[0] != weight.shape[0]:
        stored = "nothing known" if weight is None else f"{weight.dtype} and scales {list(scale.shape)}"
        raise UnknownStorage(f"'{stem}' is stored as {stored}")
    return _told(8, weight.shape[1], scale, symmetric=symmetric), (weight.shape[0], weight.shape[1])


def _two_dimensional(scale: torch.Tensor) -> torch.Tensor:
    return scale.reshape(-1, 1) if scale.dim() < 2 else scale


def _told(bits: int, columns: int, scale: torch.Tensor, *, symmetric: bool) -> Scheme:
    groups = scale.shape[1]
    return Scheme(bits, None if groups == 1 else columns // groups, symmetric)


def float_scheme_of(tensors: Mapping[str, torch.Tensor], stem: str) -> tuple[Scheme, tuple[int, int]]:
    """The scheme, and rows and columns, that the tensors of one matrix of small floats tell of.

    Args:
        tensors: by their local names; those of a fixed scale of inputs say that inputs are quantized, and
            nothing on disk says it of inputs with a scale for each token.
        stem: name of the matrix, for messages.

    Raises:
        ModelError: the tensors contradict each other.
        UnknownStorage: the matrix is not stored as small floats.
    """
    name = _float_format(tensors)
    if name is None:
        raise UnknownStorage(f"'{stem}' is not stored as small floats")
    bits, group = FLOAT_LAYOUTS[name]
    numbers = tensors["weight"] if name == "fp8" else tensors["weight_packed"]
    rows, columns = numbers.shape[0], numbers.shape[1] * (1 if name == "fp8" else 2)
    static = "input_scale" in tensors or "input_global_scale" in tensors
    activations: Activations = "static" if static else "none"
    scheme = Scheme(bits, group, format=name, activations=activations, tensor_scale=_whole(tensors))
    expected = (rows, scheme.groups(columns))
    if not scheme.divides(columns) or tuple(_two_dimensional(tensors["weight_scale"]).shape) != expected:
        raise ModelError(
            f"'{stem}': scales {list(tensors['weight_scale'].shape)} do not belong to {rows} x {columns} "
            f"{name} numbers",
            "make the artifact again",
        )
    return scheme, (rows, columns)


def read_floats(tensors: Mapping[str, torch.Tensor], stem: str, storage: torch.dtype) -> QuantizedFloats:
    """One matrix of small floats back from its tensors on disk, by their local names.

    Args:
        tensors: as `float_scheme_of` takes them.
        stem: name of the matrix, for messages.
        storage: the dtype in which the model holds its floats.

    Raises:
        ModelError: the tensors contradict each other.
        UnknownStorage: the matrix is not stored as small floats.
    """
    scheme, _ = float_scheme_of(tensors, stem)
    scale = _two_dimensional(tensors["weight_scale"])
    if scheme.format == "fp8":
        return QuantizedFloats(tensors["weight"], scale, scheme, scale.dtype)
    return QuantizedFloats(unpack_nibbles(tensors["weight_packed"]), scale, scheme, storage)


def _float_format(tensors: Mapping[str, torch.Tensor]) -> Format | None:
    """Which small floats a matrix is stored as, if any."""
    weight, packed = tensors.get("weight"), tensors.get("weight_packed")
    if weight is not None and weight.dtype == E4M3:
        return "fp8"
    if packed is not None and packed.dtype == torch.uint8:
        return "nvfp4" if "weight_global_scale" in tensors else "mxfp4"
    return None


def _whole(tensors: Mapping[str, torch.Tensor]) -> float | None:
    whole = tensors.get("weight_global_scale")
    return None if whole is None or whole.device.type == "meta" else float(whole)
