"""A random Llama of any shape, written shard by shard: larger than memory if need be."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig

from compress.formats.shards import shard_name, write_index, write_shard

Shapes = dict[str, tuple[int, ...]]


def block_shapes(config: LlamaConfig, index: int) -> Shapes:
    """The tensors of one block, by their names on disk."""
    prefix, hidden, wide = f"model.layers.{index}", config.hidden_size, config.intermediate_size
    head = hidden // config.num_attention_heads
    keys = config.num_key_value_heads * head
    return {
        f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
        f"{prefix}.self_attn.k_proj.weight": (keys, hidden),
        f"{prefix}.self_attn.v_proj.weight": (keys, hidden),
        f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
        f"{prefix}.mlp.gate_proj.weight": (wide, hidden),
        f"{prefix}.mlp.up_proj.weight": (wide, hidden),
        f"{prefix}.mlp.down_proj.weight": (hidden, wide),
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
    }


def outside_shapes(config: LlamaConfig) -> Shapes:
    """The tensors outside the blocks."""
    shapes: Shapes = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def count_bytes(shapes: Shapes, dtype: torch.dtype) -> int:
    """Bytes of all tensors."""
    return sum(dtype.itemsize * torch.Size(shape).numel() for shape in shapes.values())


def write_model(folder: Path, config: LlamaConfig, dtype: torch.dtype) -> int:
    """Write config and shards, one a block; returns the bytes of all tensors."""
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    layers = config.num_hidden_layers
    files: dict[str, list[str]] = {}
    total = 0
    for index in range(layers + 1):
        shapes = outside_shapes(config) if index == layers else block_shapes(config, index)
        file = shard_name(index, layers + 1)
        layout = {name: (dtype, shape) for name, shape in shapes.items()}
        total += write_shard(folder / file, layout, _random(shapes, dtype, generator), _ignore)
        files[file] = list(shapes)
    write_index(folder, files, total)
    return total


def _random(shapes: Shapes, dtype: torch.dtype, generator: torch.Generator) -> Callable[[str], torch.Tensor]:
    def make(name: str) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shapes[name], dtype=dtype)
        return (torch.randn(shapes[name], generator=generator) * 0.02).to(dtype)

    return make


def _ignore(_: str) -> None:
    """Nobody follows the writing of a benchmark's model."""
