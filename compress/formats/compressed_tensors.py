"""The compressed-tensors format, ``pack-quantized``: what transformers and vLLM load.

A matrix is stored as ``weight_packed`` (int32 words along the input, little end first, each value
offset by ``2^(b-1)`` to be unsigned), ``weight_scale`` ``[rows, groups]``, ``weight_shape``, and for
asymmetric schemes ``weight_zero_point`` packed along the rows. Packing is the library's own.
https://github.com/vllm-project/compressed-tensors
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from compress.core.errors import CompressError, ModelError
from compress.core.scheme import Scheme
from compress.formats.weight_format import Held, WeightFormat
from compress.numerics.affine import Quantized

_SUFFIX = ".weight"
_HOLDS = ("Linear", "Embedding")


@final
class CompressedTensors(WeightFormat):
    """Integers of 2 to 8 bits with one scale a group, in safetensors."""

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
        """``weight_packed``, ``weight_scale``, ``weight_shape`` and, if asymmetric, ``weight_zero_point``."""
        if not weight.endswith(_SUFFIX):
            raise ModelError(f"'{weight}' does not end in '{_SUFFIX}', so the format has no name for it")
        stem = weight.removesuffix(_SUFFIX)
        q, scale = parts["q"], parts["scale"]
        tensors = {
            f"{stem}.weight_packed": pack_to_int32(q, scheme.bits),
            f"{stem}.weight_scale": scale.contiguous(),
            f"{stem}.weight_shape": torch.tensor(q.shape, dtype=torch.int64),
        }
        if not scheme.symmetric:
            zero = parts["zero"]
            tensors[f"{stem}.weight_zero_point"] = pack_to_int32(zero, scheme.bits, packed_dim=0).contiguous()
        return tensors

    def encoded_bytes(self, held: Held, scale_bytes: int) -> int:
        """Packed words, scales, the shape, and zero points."""
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
        groups = {}
        for index, scheme in enumerate(frequent):
            here = [entry for entry in held if entry.scheme == scheme and not entry.expert]
            # A name is matched before a class, so the other groups take their layers from the first.
            named = sorted(entry.module for entry in here if index > 0 or entry.kind != "Linear")
            targets = ["Linear"] if index == 0 else []
            if named:
                targets.append(f"re:^({'|'.join(re.escape(name) for name in named)})$")
            groups[f"group_{index}"] = {"targets": targets, "weights": _weights(scheme)}
        quantization: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
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


def _weights(scheme: Scheme) -> dict[str, Any]:
    grouped = scheme.group_size is not None
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": scheme.group_size,
        "dynamic": False,
    }


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
