"""Tiny random models of many architectures, written as ordinary checkpoints.

Shapes are small and odd on purpose: grouped heads, tied and untied heads, sliding windows that alternate
with full attention, fused experts, matrices that are not linear layers.
"""

import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 96

_COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4}
_DECODER: dict[str, Any] = {
    **_COMMON,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SHALLOW: dict[str, Any] = {**_DECODER, "num_hidden_layers": 2}
_ALTERNATING = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _DECODER),
    "llama-tied": ("Llama", {**_DECODER, "tie_word_embeddings": True}),
    "qwen2-sliding": ("Qwen2", {**_DECODER, **_ALTERNATING, "use_sliding_window": True}),
    "qwen3": ("Qwen3", {**_DECODER, "head_dim": 8}),
    "mistral": ("Mistral", {**_DECODER, "sliding_window": 4, "head_dim": 8}),
    "gemma2": ("Gemma2", {**_DECODER, **_ALTERNATING, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3Text", {**_DECODER, **_ALTERNATING, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "gpt2": (
        "GPT2",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    ),
    "opt": (
        "OPT",
        {
            **_COMMON,
            "ffn_dim": 64,
            "num_hidden_layers": 3,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 64,
        },
    ),
    "gpt-neox": (
        "GPTNeoX",
        {**_COMMON, "intermediate_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 64},
    ),
    "phi": ("Phi", {**_DECODER, "num_key_value_heads": 4}),
    "mixtral": ("Mixtral", {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        "Qwen2Moe",
        {
            **_DECODER,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {**_DECODER, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "gpt-oss": (
        "GptOss",
        {**_DECODER, **_ALTERNATING, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "bert": (
        "Bert",
        {**_COMMON, "intermediate_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 64},
    ),
    "modernbert": (
        "ModernBert",
        {
            **_COMMON,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "max_position_embeddings": 64,
            "global_attn_every_n_layers": 2,
            "local_attention": 4,
            "pad_token_id": 0,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "albert": (
        "Albert",
        {**_COMMON, "embedding_size": 16, "intermediate_size": 64, "num_hidden_layers": 3},
    ),
}
_TWO_STACKS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 4,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", _T5),
    "t5-gated": (
        "T5",
        {**_T5, "num_layers": 4, "num_decoder_layers": 3, "feed_forward_proj": "gated-gelu"},
    ),
    "umt5": ("UMT5", {**_T5, "num_decoder_layers": 2}),
    "bart": ("Bart", _TWO_STACKS),
    "mbart": ("MBart", {**_TWO_STACKS, "decoder_layers": 4, "tie_word_embeddings": False}),
    "pegasus": ("Pegasus", _TWO_STACKS),
    # Two configurations in one, each with a list that has an entry for each block.
    "t5gemma": (
        "T5Gemma",
        {
            "vocab_size": VOCABULARY,
            "encoder": {**_DECODER, **_ALTERNATING, "head_dim": 8, "query_pre_attn_scalar": 8},
            "decoder": {**_DECODER, **_ALTERNATING, "head_dim": 8, "query_pre_attn_scalar": 8},
        },
    ),
}
"""Architectures with two stacks of blocks: with another number of them in each, or as many in both."""
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "distilbert": (
        "DistilBert",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "n_heads": 4,
            "hidden_dim": 64,
            "n_layers": 2,
            "max_position_embeddings": 64,
        },
    ),
    "phi3": ("Phi3", _SHALLOW),
    # Six query heads of eight are three of each group.
    "qwen3-eight": ("Qwen3", {**_SHALLOW, "num_attention_heads": 8, "head_dim": 4}),
    "gemma": ("Gemma", {**_SHALLOW, "head_dim": 8}),
    "granite": (
        "Granite",
        {**_SHALLOW, "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    ),
    "granite-moe": ("GraniteMoe", {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("Cohere", _SHALLOW),
    # Layer norms that add something, in front of layers without a bias.
    "starcoder2": ("Starcoder2", {**_SHALLOW, "sliding_window": None}),
    "nemotron": ("Nemotron", {**_SHALLOW, "head_dim": 8}),
    # Norms behind attention and MLP, and one over all queries that is as wide as the hidden state.
    "olmo2": ("Olmo2", _DECODER),
    "t5-model": (
        "T5",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
        },
    ),
}
"""Architectures that matter to a few methods alone."""
ENCODERS = ("bert", "modernbert", "albert")
_WITHOUT_HEAD = (*ENCODERS, "distilbert", "t5-model")
MIXTURES = ("mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss")
WITHOUT_LINEAR_LAYERS = ("gpt2",)
"""Architectures whose blocks hold their matrices in something that compressed-tensors cannot hold."""


def configuration(name: str, **changes: Any) -> Any:
    """The configuration of one architecture."""
    family, options = (CONFIGURATIONS | FURTHER | ENCODER_DECODERS)[name]
    options = {**options, **changes}
    if family == "GPT2":
        options |= {"bos_token_id": 1, "eos_token_id": 2}
    return getattr(transformers, f"{family}Config")(**options)


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model with random weights; changes are to its configuration."""
    family, _ = (CONFIGURATIONS | FURTHER | ENCODER_DECODERS)[name]
    usual = "Model" if name in _WITHOUT_HEAD else "ForCausalLM"
    usual = "ForConditionalGeneration" if name in ENCODER_DECODERS else usual
    head = {"GPT2": "LMHeadModel"}.get(family, usual)
    torch.manual_seed(seed)
    config = configuration(name, **changes)
    model = getattr(transformers, family.removesuffix("Text") + head)(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Initial values are too small to tell a wrong block from a right one.
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.config.dtype = dtype
    return model


@cache
def _root() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="models-zoo-")


@cache
def _written(name: str, seed: int, dtype: torch.dtype, **changes: Any) -> Path:
    """The folder of a model that was written before: the same are asked for hundreds of times."""
    path = Path(tempfile.mkdtemp(dir=_root().name)) / name
    build(name, seed=seed, dtype=dtype, **changes).save_pretrained(path)
    return path


def write(
    name: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Write a random model as its users would have it, and return its folder, free to be changed."""
    shutil.copytree(_written(name, seed, dtype, **changes), folder / name, dirs_exist_ok=True)
    # Whether the model was made just now or before shows in no random number that follows.
    torch.manual_seed(seed)
    return folder / name


def tokens(samples: int = 4, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[samples, length]``, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (samples, length), generator=generator)
