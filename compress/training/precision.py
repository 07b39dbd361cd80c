"""In which arithmetic a model is trained, and which arithmetic a device is fast in."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Literal

import torch

from compress.training.trainer import Precision

Arithmetic = Literal["float32", "bfloat16"]

_FAST = ("amx_bf16", "avx512_bf16")
"""What a CPU must be able to do for products of bfloat16 to be faster than those of float32."""


def resolved(precision: Precision, device: str) -> Arithmetic:
    """The arithmetic that an option means on a device of this machine."""
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    able = torch.cpu.get_capabilities()
    return "bfloat16" if any(able.get(name) for name in _FAST) else "float32"


def autocast(arithmetic: Arithmetic, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Passes that are computed inside multiply in this arithmetic; sums and norms stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=arithmetic == "bfloat16")


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Kernels that give the same bytes each time, wherever the device has them.

    Those of a CPU do, for one count of threads. On a GPU torch has to be told, and where it has no such
    kernel it goes on with another.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            torch.use_deterministic_algorithms(True, warn_only=True)
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
