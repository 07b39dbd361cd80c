"""The operator ``com.microsoft::MatMulNBits`` of ONNX Runtime: integer weights inside an ONNX graph.

It multiplies ``A [..., K]`` by the transpose of a matrix ``[N, K]`` held in blocks along ``K``: integers
``B`` uint8 ``[N, K / block, block * bits / 8]``, of 4 bits the even column in the low half of a byte;
``scales [N, K / block]``; and, for asymmetric matrices, ``zero_points`` uint8 ``[N, ceil(K / block * bits
/ 8)]``, packed the same way. A weight is ``(B - zero_point) * scale`` with unsigned integers; where there
is no zero point it is ``2^(bits-1)``. Blocks are powers of two from 16 to 256.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits

Nothing is rounded here: integers are offset, scales repeated and cast. 2 and 3 bits are stored in 4, and a
group longer than a block repeats its scale; both compute the same, in more bytes.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch.nn.functional import pad

from compress.core.errors import ModelError
from compress.numerics.affine import Quantized

DOMAIN: Final = "com.microsoft"
OPERATOR: Final = "MatMulNBits"
BLOCKS: Final = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class Packed:
    """The operands of one operator.

    Attributes:
        integers: ``B``, uint8 ``[rows, blocks, block * bits / 8]``.
        scales: float ``[rows, blocks]``.
        zeros: ``zero_points``, uint8 ``[rows, ceil(blocks * bits / 8)]``, or none.
        rows: ``N``, outputs.
        columns: ``K``, inputs; the last block may reach beyond them.
        bits: 4 or 8.
        block: columns that share a scale.
    """

    integers: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    rows: int
    columns: int
    bits: int
    block: int

    @property
    def attributes(self) -> dict[str, int]:
        """The operator's attributes but its accuracy level."""
        return {"K": self.columns, "N": self.rows, "bits": self.bits, "block_size": self.block}


def node_bits(bits: int) -> int:
    """The operator's width for integers of this many bits: 4 for 2 to 4, 8 for 5 to 8."""
    return 4 if bits <= 4 else 8


def block_size(group_size: int | None, columns: int) -> int:
    """The longest block with which a matrix can be written; 0 where there is none.

    A block must lie within one group. With one scale a row any block does, so the longest that divides
    the columns is taken, and else the shortest, whose padding is the least.
    """
    if group_size is None or group_size == columns:
        return next((block for block in BLOCKS if columns % block == 0), BLOCKS[-1])
    return next((block for block in BLOCKS if group_size % block == 0), 0)


def obstacle(group_size: int | None, columns: int) -> str | None:
    """Why the operator cannot hold a matrix, or ``None`` where it can."""
    if block_size(group_size, columns) == 0:
        return f"groups of {group_size} inputs; {OPERATOR} takes blocks of 16, 32, 64, 128 or 256"
    return None


def pack(matrix: Quantized, dtype: torch.dtype) -> Packed:
    """The operands that hold a matrix, exactly.

    Args:
        matrix: without an `obstacle`.
        dtype: of the scales, which the operator wants to be that of its input.

    Raises:
        ModelError: a scale does not survive the cast to ``dtype`` (infinite or zero in it), or the
            operator cannot hold the matrix.
    """
    reason = obstacle(matrix.scheme.group_size, matrix.columns)
    if reason is not None:
        raise ModelError(f"{OPERATOR} cannot hold {reason}", "choose another group size")
    scales = matrix.scale.to(dtype)
    if not bool((torch.isfinite(scales) & (scales != 0)).all()):
        name = str(dtype).removeprefix("torch.")
        raise ModelError(f"a scale of the model is zero or infinite in {name}", "export in float32")
    bits, rows, columns = node_bits(matrix.scheme.bits), *matrix.shape
    offset = 1 << (bits - 1)
    block = block_size(matrix.scheme.group_size, columns)
    blocks = -(-columns // block)
    unsigned = (matrix.q.to(torch.int16) + offset).to(torch.uint8)
    unsigned = pad(unsigned, (0, blocks * block - columns), value=offset)
    integers = _packed(unsigned, bits).reshape(rows, blocks, block * bits // 8)
    zeros = None
    if matrix.zero is not None:
        repeated = _repeated((matrix.zero.to(torch.int16) + offset).to(torch.uint8), blocks)
        zeros = _packed(repeated, bits)
    return Packed(integers, _repeated(scales, blocks), zeros, rows, columns, bits, block)


def unpack(packed: Packed) -> torch.Tensor:
    """The weights that an operator multiplies with, in double precision: ``[rows, columns]``."""
    blocks = packed.scales.shape[-1]
    flat = packed.integers.reshape(packed.rows, -1)
    unsigned = _unpacked(flat, packed.bits).double().unflatten(-1, (blocks, packed.block))
    zeros: torch.Tensor | float = float(1 << (packed.bits - 1))
    if packed.zeros is not None:
        zeros = _unpacked(packed.zeros.reshape(packed.rows, -1), packed.bits)[:, :blocks, None].double()
    scales = packed.scales.reshape(packed.rows, blocks, 1).double()
    return torch.mul(unsigned - zeros, scales).flatten(1)[:, : packed.columns]


def encoded_bytes(rows: int, columns: int, bits: int, group_size: int | None, *, symmetric: bool) -> int:
    """Bytes of the operands with float32 scales."""
    width, block = node_bits(bits), block_size(group_size, columns)
    blocks = -(-columns // block)
    zeros = 0 if symmetric else -(-blocks * width // 8)
    return rows * (blocks * block * width // 8 + 4 * blocks + zeros)


def _repeated(values: torch.Tensor, blocks: int) -> torch.Tensor:
    """``[rows, groups]`` to ``[rows, blocks]``: each group's value for all blocks in it."""
    return values.repeat_interleave(blocks // values.shape[1], dim=1).contiguous()


def _packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned integers ``[rows, width]`` to bytes, of 4 bits two in each, the first one low."""
    if bits == 8:
        return values.contiguous()
    even = pad(values, (0, values.shape[1] % 2))
    return torch.bitwise_or(even[:, ::2], even[:, 1::2] << 4).contiguous()


def _unpacked(values: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return values
    return torch.stack([values & 15, values >> 4], dim=-1).flatten(1)
