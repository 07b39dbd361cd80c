"""The formats of bitsandbytes, as stock transformers writes and loads them: NF4 and LLM.int8().

NF4 (Dettmers et al. 2023, "QLoRA", arXiv 2305.14314, section 3): the flattened matrix in blocks of 64
numbers, each a 4-bit index into the quantiles of a normal distribution times the block's largest magnitude;
these magnitudes are rounded to 8 bits themselves, in blocks of 256 around their mean (double quantization).
On disk: ``weight`` uint8 ``[numbers / 2, 1]``, ``weight.absmax``, ``weight.quant_map``, with double
quantization ``weight.nested_absmax`` and ``weight.nested_quant_map``, and
``weight.quant_state.bitsandbytes__nf4``, a JSON text as bytes.

LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339, section 2): one scale a row. On disk: ``weight`` int8
``[rows, columns]``, ``SCB`` float32 ``[rows]``, the largest magnitude of each row, of which 127 is the
step, and ``weight_format``, a zero.

Rounding, packing and dequantizing are the library's own; this file knows names and shapes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final, Literal

import torch

from compress.core.errors import EnvironmentFault, ModelError

Kind = Literal["nf4", "int8"]
BLOCK: Final = 64
"""Numbers that share a magnitude in NF4; the only size that transformers makes."""
_NESTED: Final = 256
_SUFFIX: Final = ".weight"


@dataclass(frozen=True)
class Stored:
    """One matrix as it lies on disk.

    Attributes:
        tensors: by local name (``weight``, ``weight.absmax``, ``SCB``, ...).
        value: the matrix ``[rows, columns]`` as a loader sees it.
    """

    tensors: Mapping[str, torch.Tensor]
    value: torch.Tensor

    def named(self, weight: str) -> dict[str, torch.Tensor]:
        """The tensors by their names on disk.

        Args:
            weight: the name that the float weight has there.

        Raises:
            ModelError: the format has no name for what belongs to it.
        """
        if not weight.endswith(_SUFFIX):
            raise ModelError(f"'{weight}' does not end in '{_SUFFIX}', so the format has no name for it")
        stem = weight.removesuffix(_SUFFIX)
        return {f"{stem}.{local}": tensor for local, tensor in self.tensors.items()}


def require() -> None:
    """Refuse before any work what needs a library that is not here.

    Raises:
        EnvironmentFault: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise EnvironmentFault(
            "this format needs bitsandbytes, not installed here",
            "pip install 'compress-models[bitsandbytes]'",
        )


def round_nf4(weight: torch.Tensor, *, double: bool) -> Stored:
    """Round a matrix to NF4.

    Args:
        weight: ``[rows, columns]`` in the precision in which the loader shall hold it.
        double: whether the magnitudes of the blocks are rounded too.
    """
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=double, quant_type="nf4"
    )
    named = {f"weight.{name}": tensor.cpu() for name, tensor in state.as_dict(packed=True).items()}
    value = functional.dequantize_4bit(packed, state).reshape(weight.shape)
    return Stored({"weight": packed.cpu(), **named}, value)


def round_int8(weight: torch.Tensor) -> Stored:
    """Round a matrix to 8 bits with one scale a row.

    Args:
        weight: ``[rows, columns]`` in the precision in which the loader shall hold it.
    """
    from bitsandbytes import functional

    # The library does so too: its kernels take float16.
    rounded, largest, _ = functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
    tensors = {
        "weight": rounded.cpu(),
        "SCB": largest.float().cpu(),
        "weight_format": torch.zeros((), dtype=torch.uint8),
    }
    return Stored(tensors, _dense(rounded, largest).to(weight.dtype))


def is_layer(module: torch.nn.Module) -> bool:
    """Whether a module is a layer of bitsandbytes."""
    return type(module).__module__.startswith("bitsandbytes.")


def dequantized(module: torch.nn.Module, loaded: torch.dtype) -> torch.Tensor | None:
    """The matrix that a loaded layer of bitsandbytes stands for; ``None`` for any other layer.

    Args:
        module: after its weight was loaded.
        loaded: the precision in which the loader holds floats.

    Raises:
        ModelError: the layer holds no quantized weight.
    """
    if not is_layer(module):
        return None
    from bitsandbytes import functional

    weight: Any = module.weight
    if (state := getattr(weight, "quant_state", None)) is not None:
        return functional.dequantize_4bit(weight.data, state)
    largest = getattr(weight, "SCB", None)
    if weight.dtype != torch.int8 or largest is None:
        raise ModelError(f"a {type(module).__name__} holds no quantized weight", "make the artifact again")
    return _dense(weight.data, largest).to(loaded)


def forget(module: torch.nn.Module) -> None:
    """Drop the weight of a layer with all that hangs on it; moved away, it would still be asked for that."""
    weight: Any = module.weight
    module.weight = type(weight)(torch.empty(weight.shape, device="meta"), requires_grad=False)


def encoded_bytes(kind: Kind, rows: int, columns: int, *, double: bool = True) -> int:
    """Bytes on disk of one matrix, for the plan."""
    if kind == "int8":
        return rows * columns + 4 * rows + 1
    blocks = -(-rows * columns // BLOCK)
    magnitudes = blocks + 4 * (-(-blocks // _NESTED) + 256) if double else 4 * blocks
    # The sixteen levels, and the JSON text.
    return -(-rows * columns // 2) + magnitudes + 4 * 16 + (180 if double else 90)


def configuration(
    kind: Kind, kept: Sequence[str], config: Mapping[str, Any], loaded: torch.dtype, *, double: bool = True
) -> dict[str, Any]:
    """The model's ``config.json`` with what a loader needs to know, in the words of transformers.

    Args:
        kept: linear modules that stay in floats.
        config: of the source.
        loaded: the precision in which the loader holds floats and computes.
    """
    from transformers import BitsAndBytesConfig

    skipped = {"llm_int8_skip_modules": sorted(kept) or None}
    if kind == "int8":
        made = BitsAndBytesConfig(load_in_8bit=True, **skipped)
    else:
        made = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=loaded,
            **skipped,
        )
    return {**config, "quantization_config": made.to_dict()}


def _dense(rounded: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Float32 ``[rows, columns]``."""
    return rounded.float() * (largest.float().reshape(-1, 1) / 127)
