"""Blocks, rows and files, held against llama.cpp's own package."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from compress.core.errors import EnvironmentFault, ModelError, PlanError
from compress.core.scheme import Scheme
from compress.formats.gguf import (
    File,
    Names,
    as_floats,
    block_bytes,
    heads_of,
    obstacle,
    pack,
    permuted,
    require_package,
)
from compress.numerics.affine import Quantized
from tests.formats.golden_layers import value


def matrix(bits: int, group: int | None, symmetric: bool, columns: int = 128) -> Quantized:
    """Random integers, scales of either sign with four digits, so that zero points times them stay exact."""
    generator = torch.Generator().manual_seed(bits)
    scheme = Scheme(bits, group, symmetric)
    bounds = (scheme.lowest, scheme.highest + 1)
    q = torch.randint(*bounds, (12, columns), generator=generator).to(torch.int8)
    scale = torch.randint(1, 16, (12, scheme.groups(columns)), generator=generator) / 256
    scale[::2] *= -1
    zero = None
    if not symmetric:
        zero = torch.randint(*bounds, tuple(scale.shape), generator=generator).to(torch.int8)
    return Quantized(q, scale.to(torch.bfloat16), zero, scheme)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "kind"),
    [
        (4, 32, True, "Q4_0"),
        (2, 32, True, "Q4_0"),
        (3, 64, True, "Q4_0"),
        (4, None, True, "Q4_0"),
        (4, 32, False, "Q4_1"),
        (3, 128, False, "Q4_1"),
        (8, 32, True, "Q8_0"),
        (8, None, True, "Q8_0"),
    ],
)
def test_blocks_are_read_exactly(bits: int, group: int | None, symmetric: bool, kind: str) -> None:
    meant = matrix(bits, group, symmetric)
    assert obstacle(meant.scheme, meant.columns) is None
    blocks = pack(meant, "m")
    assert blocks.kind == kind
    read = gguf.dequantize(blocks.data.numpy(), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(read.astype(np.float64), value(meant).numpy())
    assert torch.equal(torch.from_numpy(read), blocks.value)
    assert block_bytes(*meant.shape, meant.scheme) == blocks.data.numel()


def test_llama_cpp_s_own_rounding_comes_out_the_same() -> None:
    """What ggml rounds, packed again from its integers and scales, is the same bytes."""
    weights = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    theirs = gguf.quantize(weights, gguf.GGMLQuantizationType.Q4_0)
    blocks = theirs.reshape(8, 2, 18)
    scale = torch.from_numpy(blocks[..., :2].copy()).view(torch.float16).squeeze(-1)
    low, high = blocks[..., 2:] & 15, blocks[..., 2:] >> 4
    q = torch.from_numpy(np.concatenate([low, high], -1).astype(np.int8) - 8).flatten(1)
    ours = pack(Quantized(q, scale, None, Scheme(4, 32)), "m")
    assert np.array_equal(ours.data.numpy(), theirs)


@pytest.mark.parametrize(
    ("scheme", "columns", "reason"),
    [
        (Scheme(4, 16), 64, "groups of 16 inputs"),
        (Scheme(4, None), 48, "48 inputs"),
        (Scheme(8, 32, False), 64, "no type with zero points of more than 4 bits"),
    ],
)
def test_what_no_block_holds(scheme: Scheme, columns: int, reason: str) -> None:
    assert reason in (obstacle(scheme, columns) or "")
    groups = scheme.groups(columns)
    zero = None if scheme.symmetric else torch.zeros(2, groups, dtype=torch.int8)
    with pytest.raises(ModelError, match=reason):
        pack(Quantized(torch.zeros(2, columns, dtype=torch.int8), torch.ones(2, groups), zero, scheme), "m")


def test_an_offset_that_float16_does_not_hold() -> None:
    meant = matrix(4, 32, False)
    assert meant.zero is not None
    # 255 / 256 takes eight digits, eleven times that takes twelve.
    meant.scale[0, 0], meant.zero[0, 0] = 255 / 256, 3
    with pytest.raises(PlanError, match=r"m: 1 of 48 are not exact in float16, first offset -zero \* scale"):
        pack(meant, "m")
    blocks = pack(meant, "m", "round")
    read = gguf.dequantize(blocks.data.numpy(), gguf.GGMLQuantizationType.Q4_1)
    assert torch.equal(torch.from_numpy(read), blocks.value)
    assert torch.allclose(blocks.value.double(), value(meant), atol=0.005)


def test_rows_are_permuted_as_llama_cpp_s_converter_does() -> None:
    heads, rows = 4, 64
    weights = np.arange(rows * 3).reshape(rows, 3)
    theirs = weights.reshape(heads, 2, rows // heads // 2, 3).swapaxes(1, 2).reshape(rows, 3)
    order = permuted(rows, heads)
    assert np.array_equal(weights[order.numpy()], theirs)
    assert torch.equal(order[permuted(rows, heads, back=True)], torch.arange(rows))


def test_queries_and_keys_of_llama_alone_are_permuted() -> None:
    assert heads_of("blk.0.attn_q.weight", "llama", 8, 2) == 8
    assert heads_of("blk.10.attn_k.bias", "llama", 8, 2) == 2
    assert heads_of("blk.0.attn_v.weight", "llama", 8, 2) is None
    assert heads_of("blk.0.attn_q.weight", "qwen2", 8, 2) is None
    assert heads_of("blk.0.attn_q_norm.weight", "llama", 8, 2) is None


def test_names_are_those_of_the_package() -> None:
    names = Names("qwen3", 2)
    assert names.of("model.embed_tokens.weight") == "token_embd.weight"
    assert names.of("model.layers.1.self_attn.q_norm.weight") == "blk.1.attn_q_norm.weight"
    assert names.of("lm_head.weight") == "output.weight"
    assert names.of("model.layers.2.mlp.up_proj.weight") is None, "there are two blocks"


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q6_K"])
def test_floats_are_read_as_they_are_meant(kind: str) -> None:
    tensor = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    data, meant = as_floats(tensor, kind, "m")
    qtype = gguf.GGMLQuantizationType[kind]
    raw = data.numpy() if kind not in ("F32", "F16") else data.numpy().view({"F32": "f4", "F16": "f2"}[kind])
    assert np.array_equal(gguf.dequantize(raw, qtype).reshape(6, 256), meant.numpy())
    assert torch.allclose(meant, tensor, rtol=0.01, atol=0.05)


def test_a_weight_beyond_float16_is_refused() -> None:
    with pytest.raises(PlanError, match=r"m: weight 1e\+06 is out of float16's range"):
        as_floats(torch.tensor([[1.0, 1e6]]), "F16", "m")


def test_a_k_quant_of_weights_beyond_float16_is_refused() -> None:
    with pytest.raises(PlanError, match=r"m: a scale of Q4_K is out of float16's range"):
        as_floats(torch.full((1, 256), -1e9), "Q4_K", "m")


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGML" + bytes(100))
    with pytest.raises(ModelError, match="no whole GGUF file"):
        File(tmp_path / "model.gguf")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.formats.gguf.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="GGUF needs gguf") as caught:
        require_package()
    assert "compress-models[gguf]" in caught.value.hint
