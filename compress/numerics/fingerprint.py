"""The identity of a tensor's values.

Every weight that is written is identified once when it is meant and once when it is read back, so the
speed of this is a good part of the speed of a pass that computes little: SHA-256 takes several times as long
as rounding to the nearest integers does. XXH3 reads memory about as fast as there is memory. It finds every
mistake (two tensors have the same 128 bits with a chance of 2^-128) and is no defence against someone who
wants two tensors to look alike; against that stands the digest of the artifact, SHA-256 over its files.
"""

import torch
import xxhash


def fingerprint(tensor: torch.Tensor) -> str:
    """XXH3 of 128 bits over dtype, shape and bytes of a tensor, wherever it lives: 32 hexadecimal digits."""
    plain = tensor.detach().to("cpu").contiguous()
    digest = xxhash.xxh3_128(f"{plain.dtype} {tuple(plain.shape)}\n".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
