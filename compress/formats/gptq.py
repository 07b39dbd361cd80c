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
from dataclasses import dataclass
from typing import Any, Final, Literal, final

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from compress.core.errors import ModelError, PlanError
from compress.core.scheme import Scheme
from compress.formats.packed import Inexact, Layout, PackedFormat, Weights, halves
from compress.formats.weight_format import Held
from compress.numerics.affine import Quantized

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
        integers, zeros, _ = _unpacked(tensors, module, config)
        index = tensors["g_idx"].long()
        return Weights((integers - zeros[index]).T.to(torch.int16), tensors["scales"].float()[index].T)


def scheme_of(
    tensors: Mapping[str, torch.Tensor], module: str, config: Mapping[str, Any]
) -> tuple[Scheme, tuple[int, int]]:
    """The scheme, and rows and columns, of one matrix, from its configuration and the shapes of its tensors.

    Whoever wrote the checkpoint: fields that older writers leave out have the values that all readers give
    them (version 1, symmetric).

    Args:
        tensors: by local name; of all but ``g_idx`` the shape is enough, so they may be on the meta device.
        module: whose matrix it is.
        config: the ``quantization_config``.

    Raises:
        ModelError: tensors and configuration contradict each other.
        PlanError: the checkpoint stores what has no word elsewhere: groups out of order, other packing.
    """
    numbers = _layout(tensors, module, config)
    index = tensors.get("g_idx")
    if index is not None and not torch.equal(index.long(), torch.arange(numbers.columns) // numbers.width):
        raise PlanError(
            f"{module}: its inputs are grouped in the order of their activations (g_idx, desc_act), which "
            "only GPTQ's kernels read",
            "quantize the original model with quantize.gptq, whose activation order leaves groups in place",
        )
    return numbers.scheme, (numbers.rows, numbers.columns)


def read_matrix(tensors: Mapping[str, torch.Tensor], module: str, config: Mapping[str, Any]) -> Quantized:
    """One matrix as integers with scales in float16, lossless.

    Args:
        tensors: by local name.
        module: whose matrix it is.
        config: the ``quantization_config``.

    Raises:
        ModelError: tensors and configuration contradict each other.
        PlanError: groups out of order; or a zero point of version 1 that readers add up differently.
    """
    scheme, _ = scheme_of(tensors, module, config)
    integers, zeros, version = _unpacked(tensors, module, config)
    middle = 1 << (scheme.bits - 1)
    if version == "v1" and bool((zeros == 2 * middle).any()):
        raise PlanError(
            f"{module}: a group has the highest zero point of version 1 of GPTQ, which some readers take for "
            f"{2 * middle} and others for 0",
            "write the checkpoint as version 2 with the tool that made it",
        )
    if scheme.symmetric and bool((zeros != middle).any()):
        wrong = int(zeros[zeros != middle][0])
        raise ModelError(
            f"{module}: it is said to be symmetric, and a group has the zero point {wrong}, not {middle}",
            "is the version of the checkpoint (checkpoint_format) the right one?",
        )
    zero = None if scheme.symmetric else (zeros - middle).to(torch.int8).T.contiguous()
    q = (integers - middle).to(torch.int8).T.contiguous()
    return Quantized(q, tensors["scales"].T.contiguous(), zero, scheme)


@dataclass(frozen=True)
class _Layout:
    """What the configuration and the shapes of the tensors say of one matrix."""

    scheme: Scheme
    rows: int
    columns: int

    @property
    def width(self) -> int:
        """Inputs of one group."""
        return self.scheme.group_size or self.columns


def _layout(tensors: Mapping[str, torch.Tensor], module: str, config: Mapping[str, Any]) -> _Layout:
    _check_storage(config)
    numbers = _rule(module, config)
    bits, group = _whole(numbers, "bits", module), _whole(numbers, "group_size", module)
    if bits not in BITS:
        raise ModelError(f"{module}: a GPTQ checkpoint has 2, 3, 4 or 8 bits, and this one says {bits}")
    columns, rows = tensors["qweight"].shape[0] * _WORD // bits, tensors["qweight"].shape[1]
    if group != -1 and (group < 1 or columns % group):
        raise ModelError(f"{module}: groups of {group} do not divide {columns} inputs")
    groups = 1 if group == -1 else columns // group
    wanted = {
        "qweight": (columns * bits // _WORD, rows),
        "qzeros": (groups, rows * bits // _WORD),
        "scales": (groups, rows),
        "g_idx": (columns,),
    }
    for name, shape in wanted.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise ModelError(
                f"{module}: its tensors are not those of {bits} bits in {groups} groups: {name} is "
                f"{list(tensors[name].shape)}, expected {list(shape)}",
                "do the configuration and the weight files belong together?",
            )
    scheme = Scheme(bits, None if group == -1 else group, bool(numbers.get("sym", True)))
    return _Layout(scheme, rows, columns)


def _unpacked(
    tensors: Mapping[str, torch.Tensor], module: str, config: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, Version]:
    """Integers ``[columns, rows]`` and zero points ``[groups, rows]``, int64, not negative; the version."""
    numbers = _layout(tensors, module, config)
    bits = numbers.scheme.bits
    zeros = _fields(tensors["qzeros"].T, bits, numbers.rows).T
    version: Version = "v1" if checkpoint_format(config) == _CODES["v1"] else "v2"
    integers = _fields(tensors["qweight"], bits, numbers.columns)
    return integers, zeros + 1 if version == "v1" else zeros, version


def checkpoint_format(config: Mapping[str, Any]) -> str:
    """The version that a ``quantization_config`` names; what names none is version 1, which came first."""
    return str(config.get("checkpoint_format") or config.get("format") or _CODES["v1"])


def _check_storage(config: Mapping[str, Any]) -> None:
    stored = checkpoint_format(config)
    if stored not in _CODES.values():
        raise PlanError(
            f"the GPTQ checkpoint is packed as '{stored}', expected {' or '.join(_CODES.values())}",
            "start from the checkpoint before it was packed for one kernel",
        )
    words = config.get("pack_dtype") or "int32"
    if words != "int32":
        raise PlanError(f"the GPTQ checkpoint is packed in {words}, expected int32", "pack it in int32")


def _whole(numbers: Mapping[str, Any], name: str, module: str) -> int:
    """A whole number of the configuration."""
    value = numbers.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelError(f"{module}: the quantization_config says {name} {value!r}, expected a whole number")
    return value


def _numbers(scheme: Scheme) -> dict[str, Any]:
    return {
        "bits": scheme.bits,
        "group_size": -1 if scheme.group_size is None else scheme.group_size,
        "sym": scheme.symmetric,
    }


def _rule(module: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Bits and group of one module: the first rule that matches its name, else what holds for all."""
    for pattern, numbers in (config.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), module):
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
