"""The identity of a tensor's values, against plain integers and against every kind of change."""

import hashlib

import pytest
import torch

from compress.numerics.fingerprint import fingerprint

LANES, MULTIPLIER = 4096, 0xD1342543DE82EF95


def _words(count: int) -> torch.Tensor:
    return torch.randint(-(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(0))


def test_few_bytes_are_hashed_as_they_are() -> None:
    tensor = torch.arange(12, dtype=torch.int16).view(3, 4)
    plain = b"torch.int16 (3, 4)\n" + b"".join(value.to_bytes(2, "little") for value in range(12))
    assert fingerprint(tensor) == hashlib.sha256(plain).hexdigest()


@pytest.mark.parametrize("rows", [2, 16, 17, 37])
def test_many_are_folded_to_a_polynomial_in_each_lane(rows: int) -> None:
    tensor = _words(rows * LANES + 5)
    words = [value % 2**64 for value in tensor.tolist()]
    lanes = [0] * LANES
    for start in range(0, rows * LANES, LANES):
        for lane in range(LANES):
            lanes[lane] = (lanes[lane] * MULTIPLIER + words[start + lane]) % 2**64
    kept = [*lanes, *words[rows * LANES :]]
    plain = f"torch.int64 ({rows * LANES + 5},)\n".encode()
    plain += b"".join(value.to_bytes(8, "little") for value in kept)
    assert fingerprint(tensor) == hashlib.sha256(plain).hexdigest()


def test_every_change_shows() -> None:
    tensor = _words(40 * LANES).view(torch.bfloat16)
    prints = {fingerprint(tensor), fingerprint(tensor.view(-1, 4)), fingerprint(tensor.view(torch.float16))}
    for place in (0, 1, 4 * LANES, 77_777, tensor.numel() - 1):
        changed = tensor.view(torch.int16).clone()
        changed[place] ^= 1 << 14
        prints.add(fingerprint(changed.view(torch.bfloat16)))
    halves = tensor.view(2, -1).flip(0)
    prints |= {fingerprint(halves.reshape(-1)), fingerprint(tensor.view(-1, LANES * 4).flip(0).reshape(-1))}
    assert len(prints) == 10


def test_only_the_values_count() -> None:
    tensor = _words(3 * LANES * 8 + 8).view(torch.int8)[3:-5].view(-1, 2)
    assert fingerprint(tensor) == fingerprint(tensor.clone())
    assert fingerprint(tensor.T) == fingerprint(tensor.T.contiguous())
