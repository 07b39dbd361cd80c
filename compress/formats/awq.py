"""The AWQ checkpoint in its ``gemm`` layout: what vLLM, SGLang and GPTQModel load.

A linear layer ``[out, in]`` of 4 bits is stored as

- ``qweight`` int32 ``[in, out / 8]``: eight outputs in a word; from the lowest bits on these are outputs 0,
  2, 4, 6, 1, 3, 5, 7 of the eight;
- ``qzeros`` int32 ``[groups, out / 8]``: the zero points, in the same order;
- ``scales`` float16 ``[groups, out]``, of either sign.

A weight is ``(qweight - zero) * scale`` with unsigned integers. A symmetric layer has the zero point 8. The
format has one group size for all layers, and leaves embeddings and the head in floats.
https://github.com/mit-han-lab/llm-awq, https://github.com/casper-hansen/AutoAWQ
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, final

import torch

from compress.core.errors import ModelError
from compress.core.scheme import Scheme
from compress.formats.packed import Inexact, Layout, PackedFormat, Weights, halves, one_scheme
from compress.formats.weight_format import Held

ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs lies in each four bits of a word, from the lowest on."""
GROUPS: Final = (16, 32, 64, 128)
"""Group sizes that readers have kernels for, besides one group a row."""
_BITS: Final = 4
_IN_A_WORD: Final = 8
_MIDDLE: Final = 8


@final
class Awq(PackedFormat):
    """AWQ, ``gemm``.

    Args:
        inexact: what to do about scales that float16 does not hold.
    """

    name = "awq"

    def __init__(self, inexact: Inexact = "refuse") -> None:
        self.inexact: Inexact = inexact

    def refusal(self, held: Held) -> str | None:
        """Linear layers of 4 bits inside the model, in groups that readers have kernels for."""
        scheme = held.scheme
        if not held.expert and held.kind != "Linear":
            return f"an AWQ checkpoint cannot hold a {held.kind}"
        if held.module.rpartition(".")[2] == "lm_head":
            return "readers of AWQ keep the head in floats"
        if scheme.bits != _BITS:
            return f"an AWQ checkpoint has 4 bits, not {scheme.bits}"
        if scheme.group_size is not None and scheme.group_size not in GROUPS:
            sizes = ", ".join(str(size) for size in GROUPS)
            return f"readers of AWQ take groups of {sizes} or whole rows, not of {scheme.group_size}"
        if held.rows % _IN_A_WORD:
            return f"{held.rows} outputs do not fill whole words of {_IN_A_WORD}"
        return None

    def refusal_together(self, held: Sequence[Held]) -> str | None:
        """One group size for all; zero points do not tell layers apart, because every layer has them."""
        if len({entry.scheme.group_size for entry in held}) == 1:
            return None
        return one_scheme(held, "an AWQ checkpoint")

    def layout(self, held: Held) -> Layout:
        """``qweight``, ``qzeros`` and ``scales``."""
        groups, words = held.scheme.groups(held.columns), held.rows // _IN_A_WORD
        return {
            "qweight": (torch.int32, (held.columns, words)),
            "qzeros": (torch.int32, (groups, words)),
            "scales": (torch.float16, (groups, held.rows)),
        }

    def encode(
        self, weight: str, parts: Mapping[str, torch.Tensor], scheme: Scheme
    ) -> dict[str, torch.Tensor]:
        """The tensors of `layout` by their full names.

        Raises:
            PlanError: a scale is not exact in float16.
        """
        stem = weight.removesuffix(".weight")
        q, scale = parts["q"], parts["scale"]
        zero = parts.get("zero")
        if zero is None:
            zero = torch.zeros_like(scale, dtype=torch.int8)
        return {
            f"{stem}.qweight": _packed(q.T),
            f"{stem}.qzeros": _packed(zero.T),
            f"{stem}.scales": halves(scale, "scale", stem, self.inexact).T.contiguous(),
        }

    def configuration(
        self, held: Sequence[Held], kept: Sequence[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """``config.json`` with the one scheme, and the modules that stay in floats."""
        group = held[0].scheme.group_size
        quantization: dict[str, Any] = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": _BITS,
            "group_size": -1 if group is None else group,
            "zero_point": True,
            "modules_to_not_convert": sorted(kept) or None,
        }
        return {**config, "quantization_config": quantization}

    def read(self, tensors: Mapping[str, torch.Tensor], module: str, config: Mapping[str, Any]) -> Weights:
        """See `PackedFormat.read`."""
        qweight, qzeros, scales = (tensors[name] for name in ("qweight", "qzeros", "scales"))
        columns, rows = qweight.shape[0], scales.shape[1]
        group = columns if config["group_size"] == -1 else int(config["group_size"])
        words = rows // _IN_A_WORD
        wanted = [(columns, words), (columns // group, words), (columns // group, rows)]
        if [tuple(tensor.shape) for tensor in (qweight, qzeros, scales)] != wanted:
            raise ModelError(f"{module}: its tensors are not those of 4 bits in groups of {group}")
        if any(kept in module for kept in config.get("modules_to_not_convert") or ()):
            raise ModelError(f"{module} is packed, and the configuration says that it is not")
        integers, zeros = _unpacked(qweight), _unpacked(qzeros)
        index = torch.arange(columns) // group
        return Weights((integers - zeros[index]).T.to(torch.int16), scales.float()[index].T)


def _packed(values: torch.Tensor) -> torch.Tensor:
    """Signed integers ``[n, out]`` to words, int32 ``[n, out / 8]``."""
    eights = (values.to(torch.int32) + _MIDDLE).unflatten(1, (-1, _IN_A_WORD))[..., list(ORDER)]
    shifts = torch.arange(0, 32, _BITS, dtype=torch.int32)
    return torch.sum(eights << shifts, dim=-1, dtype=torch.int32).contiguous()


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """Words ``[n, out / 8]`` to unsigned integers, int64 ``[n, out]``."""
    wide = words.long() & 0xFFFFFFFF
    values = torch.empty(*words.shape, _IN_A_WORD, dtype=torch.int64)
    for place, output in enumerate(ORDER):
        values[..., output] = (wide >> (_BITS * place)) & 0xF
    return values.flatten(1)
