"""What reads and writes the residual stream, against what the architectures are known to do."""

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.models.load import skeleton
from compress.models.residual import Residual, find_residual
from tests import models_zoo
from tests.marks import slow_but


def residual_of(name: str, folder: Path) -> tuple[Residual, Any]:
    source = Artifact.open(models_zoo.write(name, folder))
    return find_residual(skeleton(source, dtype=torch.float64)), skeleton(source)


def test_a_llama_reads_behind_norms_and_writes_twice_a_block(tmp_path: Path) -> None:
    found, model = residual_of("llama", tmp_path)
    inside = [f"model.layers.{number}" for number in range(3)]
    reading = (*(f"self_attn.{part}_proj" for part in "qkv"), "mlp.gate_proj", "mlp.up_proj")
    assert found.width == 32
    assert found.readers == {f"{block}.{layer}" for block in inside for layer in reading} | {"lm_head"}
    writing = {f"{block}.{layer}" for block in inside for layer in ("self_attn.o_proj", "mlp.down_proj")}
    assert found.writers == writing | {"model.embed_tokens"}
    norms = {f"{block}.{which}_layernorm" for block in inside for which in ("input", "post_attention")}
    assert found.norms == norms | {"model.norm"}
    assert found.vectors == {f"{norm}.weight" for norm in found.norms}
    assert found.others == {}
    dimensions = found.dimensions(model)
    assert dimensions["model.layers.0.self_attn.q_proj.weight"] == (1,)
    assert dimensions["model.layers.0.self_attn.o_proj.weight"] == (0,)
    assert dimensions["model.embed_tokens.weight"] == (1,)


def test_matrices_lie_the_other_way_round_in_gpt2(tmp_path: Path) -> None:
    found, model = residual_of("gpt2", tmp_path)
    dimensions = found.dimensions(model)
    assert dimensions["transformer.h.0.attn.c_attn.weight"] == (0,)
    assert dimensions["transformer.h.0.mlp.c_proj.weight"] == (1,)
    assert dimensions["transformer.h.0.mlp.c_proj.bias"] == (0,)
    assert dimensions["transformer.wpe.weight"] == (1,)


@pytest.mark.parametrize(
    "name",
    slow_but(("gemma2", "bert"), ("gemma2", "bert", "modernbert", "gpt-neox", "phi", "opt", "albert")),
)
def test_everything_as_wide_as_the_stream_belongs_to_it(name: str, tmp_path: Path) -> None:
    found, model = residual_of(name, tmp_path)
    norms = {n for n, m in model.named_modules() if "Norm" in type(m).__name__ and m.weight.shape == (32,)}
    assert found.norms == norms
    leaves = {n: [leaf for leaf, _ in model.get_submodule(n).named_parameters()] for n in norms}
    assert found.vectors == {f"{n}.{leaf}" for n, own in leaves.items() for leaf in own}


def test_routers_and_fused_experts_are_found_by_their_parameters(tmp_path: Path) -> None:
    found, _ = residual_of("mixtral", tmp_path)
    block = "model.layers.0.mlp"
    names = {name: count for name, count in found.others.items() if name.startswith(block)}
    experts = f"{block}.experts"
    assert names == {f"{block}.gate.weight": 1, f"{experts}.gate_up_proj": 1, f"{experts}.down_proj": 1}


def test_what_follows_the_stream_is_told_apart(tmp_path: Path) -> None:
    found, _ = residual_of("bert", tmp_path)
    assert found.followers == {"pooler.dense"}


def test_channels_in_another_order_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x.flip(-1)))
    with pytest.raises(PlanError, match="another order"):
        residual_of("llama", tmp_path)
