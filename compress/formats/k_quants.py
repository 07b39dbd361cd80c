"""K-quants in bytes: how llama.cpp lays out super-blocks of 256 weights.

Low bits of codes lie in ``qs``, high ones in ``qh`` (``hmask`` in Q3_K), so that a kernel takes 32 or 64 of
one significance at a time; codes are stored without sign. Small integers of 6 bits are packed into 12 bytes.
https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h (``block_q2_K`` to ``block_q6_K``)
"""

import torch

from compress.numerics.k_quants import KINDS, SUPER_BLOCK, SuperBlocks


def packed(blocks: SuperBlocks) -> torch.Tensor:
    """The bytes of super-blocks, uint8 ``[n, bytes]``."""
    kind = KINDS[blocks.kind]
    codes = (blocks.codes.to(torch.int16) - kind.first).to(torch.uint8).flatten(1)
    scale = _halves(blocks.scale)
    if blocks.minima is None or blocks.minimum is None:
        if blocks.kind == "Q3_K":
            high = _bits(codes >> 2, 1)
            return torch.cat([high, _quarters(codes & 3), _scales_of_q3(blocks.scales), scale], -1)
        low, high = _nibbles(codes & 15, 64), _quarters(codes >> 4)
        return torch.cat([low, high, blocks.scales.to(torch.int8).view(torch.uint8), scale], -1)
    minimum = _halves(blocks.minimum)
    scales, minima = blocks.scales.to(torch.uint8), blocks.minima.to(torch.uint8)
    if blocks.kind == "Q2_K":
        return torch.cat([scales | minima << 4, _quarters(codes), scale, minimum], -1)
    parts = [scale, minimum, _scales_of_q4(scales, minima)]
    if blocks.kind == "Q5_K":
        parts.append(_bits(codes >> 4, 1))
    return torch.cat([*parts, _nibbles(codes & 15, 32)], -1)


def _halves(numbers: torch.Tensor) -> torch.Tensor:
    """float16 ``[n]`` as bytes ``[n, 2]``."""
    return numbers.unsqueeze(-1).contiguous().view(torch.uint8)


def _side_by_side(parts: torch.Tensor, width: int) -> torch.Tensor:
    """Small numbers ``[..., parts, bytes]`` in one byte each, the first in the lowest bits."""
    found = parts[..., 0, :].clone()
    for number in range(1, parts.shape[-2]):
        found |= parts[..., number, :] << (number * width)
    return found


def _nibbles(codes: torch.Tensor, run: int) -> torch.Tensor:
    """4 bits each: ``run`` codes low, the next ``run`` high."""
    return _side_by_side(codes.unflatten(1, (-1, 2, run)), 4).flatten(1)


def _quarters(codes: torch.Tensor) -> torch.Tensor:
    """2 bits each: of 128 codes, the first 32 in the lowest bits."""
    return _side_by_side(codes.unflatten(1, (-1, 4, 32)), 2).flatten(1)


def _bits(codes: torch.Tensor, width: int) -> torch.Tensor:
    """1 bit each: of 256 codes, the first 32 in the lowest bits."""
    return _side_by_side(codes.unflatten(1, (SUPER_BLOCK // 32, 32)), width)


def _scales_of_q3(scales: torch.Tensor) -> torch.Tensor:
    """16 integers from -32 to 31 in 12 bytes: low halves in nibbles, then the upper two bits in quarters."""
    numbers = (scales + 32).to(torch.uint8)
    low = _side_by_side((numbers & 15).unflatten(1, (2, 8)), 4)
    return torch.cat([low, _side_by_side((numbers >> 4).unflatten(1, (4, 4)), 2)], -1)


def _scales_of_q4(scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """8 scales and 8 minima of 6 bits in 12 bytes: the first four of each, with high bits of the others."""
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    third = (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4
    return torch.cat([first, second, third], -1)
