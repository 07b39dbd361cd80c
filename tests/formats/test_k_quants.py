"""The bytes of k-quants, as llama.cpp's own package reads them."""

import gguf
import numpy as np
import pytest
import torch

from compress.formats.k_quants import packed
from compress.numerics.k_quants import KINDS, KQuant, SuperBlocks, quantize


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> KQuant:
    return request.param


def random_blocks(name: KQuant, count: int = 50) -> SuperBlocks:
    """Every field at random over its whole range, so that no bit of the layout is left out."""
    kind, generator = KINDS[name], torch.Generator().manual_seed(len(name))
    blocks = 256 // kind.block

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    def units() -> torch.Tensor:
        return torch.randn(count, generator=generator).to(torch.float16)

    return SuperBlocks(
        name,
        integers(kind.first, kind.last, count, blocks, kind.block).to(torch.int8),
        integers(kind.lowest, kind.highest, count, blocks).to(torch.int16),
        integers(0, kind.highest, count, blocks).to(torch.int16) if kind.minima else None,
        units(),
        units() if kind.minima else None,
    )


def test_any_super_block_is_read_as_it_is_meant(kind: KQuant) -> None:
    blocks = random_blocks(kind)
    data = packed(blocks)
    qtype = gguf.GGMLQuantizationType[kind]
    weights, size = gguf.GGML_QUANT_SIZES[qtype]
    assert weights == 256
    assert data.shape == (50, size)
    read = gguf.dequantize(data.numpy(), qtype)
    assert np.array_equal(read, blocks.value().numpy())


def test_what_the_search_finds_is_read_as_it_is_meant(kind: KQuant) -> None:
    weight = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    blocks = quantize(weight, kind)
    data = packed(blocks).reshape(3, -1).numpy()
    read = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(read, blocks.value().reshape(3, 512).numpy())
