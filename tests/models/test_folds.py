"""Folds found by probing leave a model's function as it is, and none that is known is missed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress.core.artifact import Artifact
from compress.models.fold_search import find_folds
from compress.models.folds import Fold, Folds, Rescaling
from compress.models.load import skeleton
from tests import models_zoo
from tests.marks import slow_but
from tests.single_steps import loaded, outputs

_ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
_GATED = {"mlp.gate_proj", "mlp.up_proj"}
_LLAMA = {
    "input_layernorm": _ATTENTION,
    "post_attention_layernorm": _GATED,
    "self_attn.v_proj": {"self_attn.o_proj"},
    "mlp.up_proj": {"mlp.down_proj"},
}
_GEMMA = {**_LLAMA, "pre_feedforward_layernorm": _GATED}
del _GEMMA["post_attention_layernorm"]
_MIXTURE = {**_LLAMA, "post_attention_layernorm": {"mlp.experts.gate_up_proj"}}
del _MIXTURE["mlp.up_proj"]
KNOWN: dict[str, dict[str, set[str]]] = {
    "llama": _LLAMA,
    "llama-tied": _LLAMA,
    "qwen2-sliding": _LLAMA,
    "qwen3": _LLAMA,
    "mistral": _LLAMA,
    # Norms behind the layers multiply what goes into the residual stream.
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    # What follows a GELU takes no factor.
    "gpt2": {"ln_1": {"attn.c_attn"}, "ln_2": {"mlp.c_fc"}, "attn.c_attn": {"attn.c_proj"}},
    # A ReLU lets positive factors through.
    "opt": {
        "self_attn_layer_norm": _ATTENTION,
        "final_layer_norm": {"fc1"},
        "self_attn.v_proj": {"self_attn.out_proj"},
        "fc1": {"fc2"},
    },
    "gpt-neox": {
        "input_layernorm": {"attention.query_key_value"},
        "post_attention_layernorm": {"mlp.dense_h_to_4h"},
        "attention.query_key_value": {"attention.dense"},
    },
    # One norm feeds attention and MLP side by side.
    "phi": {"input_layernorm": {*_ATTENTION, "mlp.fc1"}, "self_attn.v_proj": {"self_attn.dense"}},
    "phi3": {
        "input_layernorm": {"self_attn.qkv_proj"},
        "post_attention_layernorm": {"mlp.gate_up_proj"},
        "self_attn.qkv_proj": {"self_attn.o_proj"},
        "mlp.gate_up_proj": {"mlp.down_proj"},
    },
    # A norm in front of a router and experts: the router follows, all experts and what all tokens share read.
    "mixtral": _MIXTURE,
    "qwen2-moe": {
        **_MIXTURE,
        "post_attention_layernorm": {
            "mlp.experts.gate_up_proj",
            "mlp.shared_expert.gate_proj",
            "mlp.shared_expert.up_proj",
            "mlp.shared_expert_gate",
        },
        "mlp.shared_expert.up_proj": {"mlp.shared_expert.down_proj"},
    },
    "qwen3-moe": _MIXTURE,
    "gpt-oss": _MIXTURE,
    "bert": {"attention.self.value": {"attention.output.dense"}},
    "distilbert": {"attention.v_lin": {"attention.out_lin"}},
    "albert": {"albert_layers.0.attention.value": {"albert_layers.0.attention.dense"}},
}


def found_in(folder: Path) -> Folds:
    return find_folds(skeleton(Artifact.open(folder), dtype=torch.float64))


def put(model: Any, folds: tuple[Fold, ...], seed: int = 0) -> None:
    """Random factors in all folds of a model."""
    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, Rescaling] = {}
    for fold in folds:
        scales = torch.rand(len(fold.rows), generator=generator, dtype=torch.float64) * 3 + 0.25
        for name, change in fold.rescalings(model, scales).items():
            changes[name] = changes[name].joined(change) if name in changes else change
    with torch.no_grad():
        for name, change in changes.items():
            parameter = model.get_parameter(name)
            parameter.copy_(change.of(parameter))


@pytest.mark.parametrize(
    "name",
    slow_but(
        ("llama", "gemma2", "gpt2", "opt", "mixtral", "bert"),
        [*models_zoo.CONFIGURATIONS, "distilbert", "phi3"],
    ),
)
def test_random_factors_leave_the_function_as_it_is(name: str, tmp_path: Path) -> None:
    folder = models_zoo.write(name, tmp_path)
    found = found_in(folder)
    model = loaded(folder, torch.float64)
    before = outputs(model)
    put(model, found.folds)
    after = outputs(model)
    # Norms and softmaxes compute in single precision inside some models, whatever comes in.
    assert float((before - after).abs().max()) <= 1e-5 * float(before.abs().max())
    readers = {f"{fold.block}.{reader.layer}" for fold in found.folds for reader in fold.readers}
    assert not readers & set(found.unfolded)
    if name in KNOWN:
        blocks = sorted({fold.block for fold in found.folds})
        for block in blocks:
            here = {f.producer: {r.layer for r in f.readers} for f in found.folds if f.block == block}
            assert here == KNOWN[name]


@pytest.mark.parametrize("name", slow_but(("phi3",), ("llama", "phi3", "opt")))
def test_it_is_exact_where_the_model_computes_in_double_precision(name: str, tmp_path: Path) -> None:
    folder = models_zoo.write(name, tmp_path)
    model = loaded(folder, torch.float64)
    before = outputs(model)
    linear = tuple(fold for fold in found_in(folder).folds if fold.kind == "linear")
    put(model, linear)
    assert float((before - outputs(model)).abs().max()) <= 1e-6 * float(before.abs().max())


def test_values_shared_by_several_heads_have_one_factor(tmp_path: Path) -> None:
    folds = found_in(models_zoo.write("llama", tmp_path)).folds
    fold = next(f for f in folds if f.producer == "self_attn.v_proj")
    # Four heads of eight columns over two of values.
    expected = torch.arange(32) // 16 * 8 + torch.arange(32) % 8
    assert torch.equal(fold.rows, torch.arange(16))
    assert torch.equal(fold.readers[0].channels, expected)


def test_fused_projections_give_their_values_alone(tmp_path: Path) -> None:
    folds = found_in(models_zoo.write("gpt-neox", tmp_path)).folds
    fold = next(f for f in folds if f.producer == "attention.query_key_value")
    # Query, key and value of a head lie one after the other.
    assert torch.equal(fold.rows, torch.cat([torch.arange(8) + 24 * head + 16 for head in range(4)]))
    assert torch.equal(fold.readers[0].channels, torch.arange(32))


def test_a_norm_that_adds_one_is_told(tmp_path: Path) -> None:
    folds = found_in(models_zoo.write("gemma2", tmp_path)).folds
    assert {f.producer: dict(f.offsets) for f in folds if f.kind == "norm"} == {
        "input_layernorm": {"weight": 1.0},
        "pre_feedforward_layernorm": {"weight": 1.0},
    }
    weight = torch.tensor([0.5, -1.0, 0.0])
    divided = Rescaling({0: torch.tensor([0.5, 2.0, 4.0])}, 1.0).of(weight)
    torch.testing.assert_close(1 + divided, (1 + weight) * torch.tensor([0.5, 2.0, 4.0]))


@pytest.mark.parametrize(
    ("name", "router", "columns"),
    [
        ("mixtral", "mlp.gate.weight", -1),
        ("qwen3-moe", "mlp.gate.weight", -1),
        ("gpt-oss", "mlp.router.weight", -2),
    ],
)
def test_a_router_follows_and_has_no_say(name: str, router: str, columns: int, tmp_path: Path) -> None:
    found = found_in(models_zoo.write(name, tmp_path))
    fold = next(f for f in found.folds if f.producer == "post_attention_layernorm")
    assert [(reader.layer, reader.dimension) for reader in fold.followers] == [(router, -1)]
    assert [(reader.layer, reader.dimension) for reader in fold.readers] == [
        ("mlp.experts.gate_up_proj", columns)
    ]
    assert f"{fold.block}.{router}" in fold.parameters
    inner = found.unfolded[f"{fold.block}.mlp.experts.down_proj"]
    assert inner == "nothing in its block scales its input"


def test_a_router_may_cast_its_weight(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "vocab_size": 96}
    ranks = {
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "qk_nope_head_dim": 8,
    }
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = transformers.DeepseekV3Config(
        **sizes, **ranks, **experts, **heads, num_hidden_layers=2, first_k_dense_replace=1
    )
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    found = found_in(tmp_path)
    name = "model.layers.1.post_attention_layernorm"
    fold = next(f for f in found.folds if f.name == name)
    assert [reader.layer for reader in fold.followers] == ["mlp.gate.weight"]
    assert {"mlp.experts.gate_up_proj", "mlp.shared_experts.up_proj"} <= {r.layer for r in fold.readers}
    model = loaded(tmp_path, torch.float64)
    before = outputs(model)
    put(model, found.folds)
    assert float((before - outputs(model)).abs().max()) <= 1e-5 * float(before.abs().max())


def test_what_cannot_take_a_factor_is_named_with_the_reason(tmp_path: Path) -> None:
    gelu = found_in(models_zoo.write("gpt2", tmp_path)).unfolded
    assert gelu["transformer.h.0.mlp.c_proj"] == "mlp.c_fc reaches it by more than a product"
    after = found_in(models_zoo.write("bert", tmp_path)).unfolded
    assert "also feeds what lies beyond its block" in after["encoder.layer.0.intermediate.dense"]
    first = found_in(models_zoo.write("modernbert", tmp_path)).unfolded
    assert first["layers.0.attn.Wqkv"] == "nothing in its block scales its input"
