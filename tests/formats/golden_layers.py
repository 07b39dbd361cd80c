"""What another tool packed, and what went into it; see `golden/README.md`."""

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from compress.core.scheme import Scheme
from compress.numerics.affine import Quantized

ROWS, COLUMNS, GROUP = 32, 32, 16


@cache
def packed() -> dict[str, torch.Tensor]:
    """The tensors that GPTQModel wrote."""
    return load_file(Path(__file__).parent / "golden" / "packed.safetensors")


def layer(bits: int, *, symmetric: bool) -> Quantized:
    """The layer that was packed, with scales of either sign that float16 holds."""
    top = 1 << bits
    row, column = torch.arange(ROWS)[:, None], torch.arange(COLUMNS)[None]
    group = torch.arange(COLUMNS // GROUP)[None]
    q = (5 * row + 3 * column + row * column // 7) % top
    scale = (2 * (row + 7 * group) - 31).float() / 1024
    zero = None if symmetric else (1 + (3 * row + group) % (top - 1) - top // 2).to(torch.int8)
    scheme = Scheme(bits, GROUP, symmetric)
    return Quantized((q - top // 2).to(torch.int8), scale, zero, scheme)


def parts(matrix: Quantized) -> dict[str, torch.Tensor]:
    """A matrix as formats take it."""
    found = {"q": matrix.q, "scale": matrix.scale}
    return found if matrix.zero is None else {**found, "zero": matrix.zero}


def value(matrix: Quantized) -> torch.Tensor:
    """What the integers stand for, in double precision, by their definition."""
    groups = matrix.q.double().unflatten(1, (matrix.groups, -1))
    if matrix.zero is not None:
        groups = groups - matrix.zero.double().unsqueeze(-1)
    return (groups * matrix.scale.double().unsqueeze(-1)).flatten(1)
