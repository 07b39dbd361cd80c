"""The identity of a tensor's values, against a published value and against every kind of change."""

import torch
import xxhash

from compress.numerics.fingerprint import fingerprint


def _words(count: int) -> torch.Tensor:
    return torch.randint(-(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(0))


def test_it_is_xxh3_over_dtype_shape_and_bytes() -> None:
    # The library is the one that is meant: the value of nothing, of XXH3's own tests.
    assert xxhash.xxh3_128(b"").hexdigest() == "99aa06d3014798d86001c324468d497f"
    tensor = torch.arange(12, dtype=torch.int16).view(3, 4)
    plain = b"torch.int16 (3, 4)\n" + b"".join(value.to_bytes(2, "little") for value in range(12))
    assert fingerprint(tensor) == xxhash.xxh3_128(plain).hexdigest()
    assert fingerprint(torch.empty(0, 2)) == xxhash.xxh3_128(b"torch.float32 (0, 2)\n").hexdigest()


def test_every_change_shows() -> None:
    tensor = _words(20_000).view(torch.bfloat16)
    prints = {fingerprint(tensor), fingerprint(tensor.view(-1, 4)), fingerprint(tensor.view(torch.float16))}
    for place in (0, 1, 16_384, 77_777, tensor.numel() - 1):
        changed = tensor.view(torch.int16).clone()
        changed[place] ^= 1 << 14
        prints.add(fingerprint(changed.view(torch.bfloat16)))
    halves = tensor.view(2, -1).flip(0)
    prints |= {fingerprint(halves.reshape(-1)), fingerprint(-tensor)}
    assert len(prints) == 10


def test_only_the_values_count() -> None:
    tensor = _words(1_001).view(torch.int8)[3:-5].view(-1, 2)
    assert fingerprint(tensor) == fingerprint(tensor.clone())
    assert fingerprint(tensor.T) == fingerprint(tensor.T.contiguous())
