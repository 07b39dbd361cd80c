"""The GPTQ checkpoint: what GPTQModel, transformers with GPTQModel, vLLM and SGLang load.

A linear layer ``[out, in]`` of ``b`` bits is stored as

- ``qweight`` int32 ``[in * b / 32, out]``: unsigned integers as one stream of bits along the input, lowest
  bits first; of 3 bits some lie across two words;
- ``qzeros`` int32 ``[groups, out * b / 32]``: the zero points, packed the same way along the output. Version
  1 stores them less one, version 2 (``gptq_v2``) as they are;
- ``scales`` float16 ``[groups, out]``, of either sign;
- ``g_idx`` int32 ``[in]``: the group of each input.

A weight is ``(qweight - zero) * scale``. A symmetric layer has the zero point ``2^(b-1)``. Version 1 has no
word for the zero point 0: less one it wraps around, which readers add up differently, so it is refused.
https://github.com/ModelCloud/GPTQModel, https://github.com/AutoGPTQ/AutoGPTQ
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, final

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from compress.core.errors import ModelError, PlanError
from compress.core.scheme import Scheme
from compress.formats.packed import Inexact, Layout, PackedFormat, Weights, halves
from compress.formats.weight_format import Held

Version = Literal["v1", "v2"]
GROUPS: Final = (16, 32, 64, 128, 256, 512, 1024)
"""Group sizes that readers have kernels for, besides one group a row."""
BITS: Final = (2, 3, 4, 8)
_CODES: Final[Mapping[Version, str]] = {"v1": "gptq", "v2": "gptq_v2"}
_WORD: Final = 32


@final
class Gptq(PackedFormat):
    """GPTQ in one of its two versions.

    Args:
        version: of the checkpoint.
        inexact: what to do about scales that float16 does not hold.
    """

    name = "gptq"

    def __init__(self, version: Version = "v1", inexact: Inexact = "refuse") -> None:
        self.version = version
        self.inexact: Inexact = inexact

    def refusal(self, held: Held) -> str | None:
        """Linear layers alone, with bits and groups that readers have kernels for, in whole words."""
        scheme = held.scheme
        if not held.expert and held.kind != "Linear":
            return f"a GPTQ checkpoint cannot hold a {held.kind}"
        if scheme.bits not in BITS:
            return f"a GPTQ checkpoint has 2, 3, 4 or 8 bits, not {scheme.bits}"
        if scheme.group_size is not None and scheme.group_size not in GROUPS:
            sizes = ", ".join(str(size) for size in GROUPS)
            return f"readers of GPTQ take groups of {sizes} or whole rows, not of {scheme.group_size}"
        for what, size in (("inputs", held.columns), ("outputs", held.rows)):
            if size * scheme.bits % _WORD:
                return f"{size} {what} of {scheme.bits} bits do not fill whole words of {_WORD} bits"
        return None

    def refusal_together(self, held: Sequence[Held]) -> str | None:
        """Nothing: the configuration can give each module bits and groups of its own."""
        return None

    def layout(self, held: Held) -> Layout:
        """``qweight``, ``qzeros``, ``scales`` and ``g_idx``."""
        bits, groups = held.scheme.bits, held.scheme.groups(held.columns)
        return {
            "qweight": (torch.int32, (held.columns * bits // _WORD, held.rows)),
            "qzeros": (torch.int32, (groups, held.rows * bits // _WORD)),
            "scales": (torch.float16, (groups, held.rows)),
            "g_idx": (torch.int32, (held.columns,)),
        }

    def encode(
        self, weight: str, parts: Mapping[str, torch.Tensor], scheme: Scheme
    ) -> dict[str, torch.Tensor]:
        """The tensors of `layout` by their full names.

        Raises:
            PlanError: a scale is not exact in float16, or version 1 cannot hold a zero point.
        """
        stem = weight.removesuffix(".weight")
        q, scale = parts["q"], parts["scale"]
        zero = parts.get("zero")
        if zero is None:
            zero = torch.zeros_like(scale, dtype=torch.int8)
        if self.version == "v1":
            if bool((zero <= scheme.lowest).any()):
                raise PlanError(
                    f"{stem}: a group has the zero point 0, which version 1 of GPTQ cannot store",
                    "write version 2 (--version v2, or --to gptq_v2)",
                )
            zero = zero - 1
        width = q.shape[1] if scheme.group_size is None else scheme.group_size
        return {
            f"{stem}.qweight": pack_to_int32(q, scheme.bits).T.contiguous(),
            f"{stem}.qzeros": pack_to_int32(zero, scheme.bits, packed_dim=0).T.contiguous(),
            f"{stem}.scales": halves(scale, "scale", stem, self.inexact).T.contiguous(),
            f"{stem}.g_idx": torch.arange(q.shape[1], dtype=torch.int32) // width,
        }

    def configuration(
        self, held: Sequence[Held], kept: Sequence[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """``config.json`` with the commonest scheme for all, and rules for the modules that differ."""
        common = Counter(entry.scheme for entry in held).most_common(1)[0][0]
        rules: dict[str, dict[str, Any]] = {f"-:^{re.escape(module)}$": {} for module in sorted(kept)}
        for entry in sorted(held, key=lambda entry: entry.module):
            if entry.scheme != common:
                rules[f"+:^{re.escape(entry.module)}$"] = _numbers(entry.scheme)
        quantization: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": _CODES[self.version],
            "format": _CODES[self.version],
            **_numbers(common),
            "desc_act": False,
            "lm_head": any(entry.module.rpartition(".")[2] == "lm_head" for entry in held),
            "pack_dtype": "int32",
            "meta": {"quantizer": ["compress"]},
        }
        if rules:
            quantization["dynamic"] = rules
        if kept:
            # The same for readers that know no rules (optimum): ends of the names that are quantized.
            quantization["modules_in_block_to_quantize"] = [sorted(entry.module for entry in held)]
        return {**config, "quantization_config": quantization}

    def read(self, tensors: Mapping[str, torch.Tensor], module: str, config: Mapping[str, Any]) -> Weights:
        """See `PackedFormat.read`; the version is the one that the configuration names."""
        numbers = _rule(module, config)
        bits, group = int(numbers["bits"]), int(numbers["group_size"])
        qweight, qzeros, scales, g_idx = (tensors[name] for name in ("qweight", "qzeros", "scales", "g_idx"))
        columns, rows = g_idx.numel(), qweight.shape[1]
        groups = 1 if group == -1 else columns // group
        wanted = [(columns * bits // _WORD, rows), (groups, rows * bits // _WORD), (groups, rows)]
        if [tuple(tensor.shape) for tensor in (qweight, qzeros, scales)] != wanted:
            raise ModelError(f"{module}: its tensors are not those of {bits} bits in {groups} groups")
        integers = _fields(qweight, bits, columns)
        zeros = _fields(qzeros.T, bits, rows).T
        if config["checkpoint_format"] == _CODES["v1"]:
            zeros = zeros + 1
        index = g_idx.long()
        return Weights((integers - zeros[index]).T.to(torch.int16), scales.float()[index].T)


def _numbers(scheme: Scheme) -> dict[str, Any]:
    return {
        "bits": scheme.bits,
        "group_size": -1 if scheme.group_size is None else scheme.group_size,
        "sym": scheme.symmetric,
    }


def _rule(module: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Bits and group of one module: the first rule that matches its name, else what holds for all."""
    for pattern, numbers in config.get("dynamic", {}).items():
        if re.match(pattern[2:], module):
            if pattern.startswith("-:"):
                raise ModelError(f"{module} is packed, and the configuration says that it is not")
            return {**config, **numbers}
    return config


def _fields(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The fields of ``bits`` bits in a stream of 32-bit words along the first dimension, lowest bits first.

    Args:
        words: int32 ``[words, n]``.
        count: how many fields there are.

    Returns:
        int64 ``[count, n]``, not negative.
    """
    stream = words.long() & 0xFFFFFFFF
    after = torch.cat([stream[1:], torch.zeros_like(stream[:1])])
    first = torch.arange(count) * bits
    word, place = first // _WORD, (first % _WORD).unsqueeze(1)
    # Two words side by side hold every field that begins in the first of them.
    below = stream[word] >> place
    above = torch.where(place + bits > _WORD, after[word] << (_WORD - place), 0)
    return (below | above) & ((1 << bits) - 1)
