"""The identity of a tensor's values.

Every weight that is written is identified once when it is meant and once when it is read back, so the
speed of this is a good part of the speed of a pass that computes little. SHA-256 over all bytes takes
several times as long as rounding them to the nearest integers does. So the bytes are folded first, and
SHA-256 is taken over what is left. That finds every mistake: a change of one word always shows, changes of
several words cancel with a chance of about 2^-64. It is no defence against someone who wants two tensors to
look alike; against that stands the digest of the artifact, SHA-256 over its files.
"""

import hashlib

import numpy
import torch
from numpy.typing import NDArray

_LANES = 4096
_ROWS = 16
"""Rows that are multiplied at once: they stay in the cache."""
_MULTIPLIER = 0xD1342543DE82EF95
"""Odd, so that no change of one word is lost (Steele and Vigna 2022, "Computationally easy, spectrally good
multipliers for congruential pseudorandom number generators")."""
_POWERS = numpy.array([pow(_MULTIPLIER, power, 1 << 64) for power in range(_ROWS + 1)], dtype=numpy.uint64)


def fingerprint(tensor: torch.Tensor) -> str:
    """SHA-256 over dtype, shape and folded bytes of a tensor, wherever it lives."""
    plain = tensor.detach().to("cpu").contiguous()
    raw = plain.reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}\n".encode())
    whole = raw.size - raw.size % (8 * _LANES)
    if whole > 8 * _LANES:
        digest.update(_folded(raw[:whole].view("<u8").reshape(-1, _LANES)).data)
        raw = raw[whole:]
    digest.update(raw.data)
    return digest.hexdigest()


def _folded(words: NDArray[numpy.uint64]) -> NDArray[numpy.uint64]:
    """Of words ``[rows, lanes]`` a polynomial in each lane modulo 2^64, by Horner's rule: ``[lanes]``."""
    total = numpy.zeros(_LANES, dtype=numpy.uint64)
    products = numpy.empty((_ROWS, _LANES), dtype=numpy.uint64)
    for start in range(0, words.shape[0], _ROWS):
        part = words[start : start + _ROWS]
        count = part.shape[0]
        numpy.multiply(part, _POWERS[count - 1 :: -1, None], out=products[:count])
        total *= _POWERS[count]
        total += products[:count].sum(0)
    return total
