"""Expert pruning on mixtures whose experts lie on disk one by one and in one tensor."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress import engine
from compress.core.artifact import Artifact
from compress.core.errors import PlanError, UsageError, VerificationError
from compress.core.passes import build
from compress.core.run import CalibrationSource, Run
from compress.prune.experts import Experts
from compress.sweep import expert_removal
from compress.sweep.expert_plan import AskedExperts, plan_experts
from tests import models_zoo
from tests.dummies import Recorder
from tests.marks import slow_but
from tests.single_steps import (
    LENGTH,
    SAMPLES,
    applied,
    decisions,
    killed_and_resumed,
    loaded,
    numbers,
    outputs,
    recipe_of,
    tensors,
)

prune = partial(applied, "prune.experts")
ROUTERS = {
    "mixtral": "gate.weight",
    "qwen2-moe": "gate.weight",
    "qwen3-moe": "gate.weight",
    "gpt-oss": "router.weight",
    "granite-moe": "router.weight",
}


@contextmanager
def barred(routers: Mapping[Any, Sequence[int]]) -> Iterator[None]:
    """Logits of these experts at minus infinity, where any model computes them."""
    original = torch.nn.functional.linear

    def linear(rows: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        result = original(rows, weight, bias)
        for router, gone in routers.items():
            if weight is router:
                result[..., list(gone)] = float("-inf")
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        yield


def gone_of(name: str, model: Any, layers: Mapping[str, Any]) -> dict[Any, list[int]]:
    return {
        model.get_parameter(f"{layer}.{ROUTERS[name]}"): [
            number for number in range(row["parts"]) if number not in numbers(row["kept"])
        ]
        for layer, row in layers.items()
    }


@pytest.mark.parametrize("by", slow_but(("effect",), ("effect", "use")))
@pytest.mark.parametrize("name", slow_but(("mixtral", "qwen2-moe", "gpt-oss"), ROUTERS))
def test_it_computes_what_the_big_model_does_when_the_others_cannot_be_chosen(
    name: str, by: str, tmp_path: Path
) -> None:
    source, recorder = models_zoo.write(name, tmp_path), Recorder()
    out = prune(source, tmp_path / "out", recorder, keep=0.75, by=by)
    said = decisions(out)
    assert said["experts"] == {"of": 4, "asked": 3, "got": 3}
    assert said["experts_per_token"] == {"before": 2, "after": 2}
    assert list(said["config"].values()) == [3]
    assert len(said["layers"]) == 3
    assert any("asked for 3 of 4" in message for message in recorder.messages)
    small, big = loaded(out.path), loaded(source)
    whole = outputs(big)
    with barred(gone_of(name, big, said["layers"])):
        expected = outputs(big)
    assert float((outputs(small) - expected).abs().max()) <= 1e-5
    assert float((whole - expected).abs().max()) > 1e-4


@pytest.mark.parametrize("name", slow_but(("mixtral", "gpt-oss"), ("mixtral", "qwen3-moe", "gpt-oss")))
def test_what_stays_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    source = models_zoo.write(name, tmp_path, dtype=torch.bfloat16)
    out = prune(source, tmp_path / "out", keep=0.5)
    before, after = tensors(source), tensors(out.path)
    layers = list(decisions(out)["layers"].values())
    assert out.lineage is not None
    for key, tensor in after.items():
        assert tensor.dtype == before[key].dtype
        if ".layers." not in key:
            assert torch.equal(tensor, before[key])
            continue
        index = int(key.split(".layers.")[1].split(".")[0])
        staying = numbers(layers[index]["kept"])
        if ".experts." in key and name != "gpt-oss":
            head, _, rest = key.partition(".experts.")
            number, _, leaf = rest.partition(".")
            assert torch.equal(tensor, before[f"{head}.experts.{staying[int(number)]}.{leaf}"])
        elif tensor.shape != before[key].shape:
            assert torch.equal(tensor, before[key][staying])
        else:
            assert torch.equal(tensor, before[key])
    lost = before.keys() - after.keys()
    assert bool(lost) is (name != "gpt-oss")
    assert all(".experts." in key for key in lost)


def test_use_and_effect_are_those_of_the_whole_model(tmp_path: Path) -> None:
    source = models_zoo.write("qwen2-moe", tmp_path)
    rows = decisions(prune(source, tmp_path / "out", keep=0.5))["layers"]
    model = loaded(source)
    inputs: dict[str, torch.Tensor] = {}
    picks: dict[str, torch.Tensor] = {}
    for layer in rows:
        mixture = model.get_submodule(layer)
        mixture.register_forward_pre_hook(
            lambda _, args, layer=layer: inputs.__setitem__(layer, args[0].clone())
        )
        mixture.gate.register_forward_hook(
            lambda _, args, result, layer=layer: picks.__setitem__(layer, result[2])
        )
    with torch.no_grad():
        model(input_ids=models_zoo.tokens(SAMPLES, LENGTH))
    for layer, row in rows.items():
        used = torch.bincount(picks[layer].flatten(), minlength=4)
        assert row["use"] == " ".join(map(str, used.tolist()))
        assert row["tokens"] == SAMPLES * LENGTH
        mixture = model.get_submodule(layer)
        effects = []
        with torch.no_grad():
            given = inputs[layer]
            whole = mixture(given)
            for expert in range(4):
                with barred({mixture.gate.weight: [expert]}):
                    effects.append(float((mixture(given) - whole).square().sum() / whole.square().sum()))
        came = [float(value) for value in row["effect"].split()]
        assert came == pytest.approx(effects, rel=1e-2)
        best = sorted(range(4), key=lambda expert: -effects[expert])[:2]
        assert numbers(row["kept"]) == sorted(best)


def test_a_token_uses_no_more_experts_than_there_are(tmp_path: Path) -> None:
    source = models_zoo.write("mixtral", tmp_path, num_experts_per_tok=3)
    out = prune(source, tmp_path / "out", keep=0.5)
    said = decisions(out)
    assert said["experts_per_token"] == {"before": 3, "after": 2}
    assert said["config"] == {"num_local_experts": 2, "num_experts_per_tok": 2}
    big = loaded(source)
    with barred(gone_of("mixtral", big, said["layers"])):
        expected = outputs(big)
    assert float((outputs(loaded(out.path)) - expected).abs().max()) <= 1e-5


def test_two_experts_stay_and_the_multiple_is_kept(tmp_path: Path) -> None:
    source = models_zoo.write("qwen3-moe", tmp_path, num_experts=8)
    plan = plan_experts(AskedExperts(0.1), Artifact.open(source), Run())
    assert (plan.of, plan.asked, plan.kept) == (8, 1, 2)
    said = decisions(prune(source, tmp_path / "out", keep=0.65, multiple=4))
    assert said["experts"] == {"of": 8, "asked": 5, "got": 4}


def test_an_expert_that_is_never_chosen_goes_first(tmp_path: Path) -> None:
    source = models_zoo.write("gpt-oss", tmp_path)
    stored = load_file(source / "model.safetensors")
    for key in stored:
        if key.endswith("router.bias"):
            stored[key][1] = -1e4
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    for by in ("use", "effect"):
        rows = decisions(prune(source, tmp_path / by, keep=0.75, by=by))["layers"]
        assert {row["kept"] for row in rows.values()} == {"0 2-3"}
        assert {row["use"].split()[1] for row in rows.values()} == {"0"}


@pytest.mark.parametrize(
    ("event", "number"),
    [
        ("block.finish", 2),
        *(
            pytest.param(event, number, marks=pytest.mark.slow)
            for event, number in (("block.calibrate", 2), ("shard.tensor", 30), ("artifact.rename", 1))
        ),
    ],
)
def test_a_run_that_is_killed_resumes_to_the_same_bytes(event: str, number: int, tmp_path: Path) -> None:
    source = models_zoo.write("mixtral", tmp_path)
    recipe = recipe_of("prune.experts", source, tmp_path, keep=0.5)
    again = killed_and_resumed(recipe, tmp_path, event, number)
    assert again.count("block.resume") > 0
    assert again.count("block.resume") + again.count("block.start") == 4


def test_a_wrong_cut_is_caught_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models_zoo.write("mixtral", tmp_path)
    right = expert_removal.smaller_weights

    def wrong(model: Any, mixture: Any, staying: Sequence[int]) -> dict[str, torch.Tensor]:
        weights = right(model, mixture, staying)
        return {**weights, mixture.router: weights[mixture.router].roll(1, 0)}

    monkeypatch.setattr(expert_removal, "smaller_weights", wrong)
    with pytest.raises(VerificationError, match="when the same experts cannot be chosen"):
        prune(source, tmp_path / "out")


@pytest.mark.slow
def test_it_may_be_pruned_again_and_rounded(tmp_path: Path) -> None:
    source = models_zoo.write("mixtral", tmp_path, num_local_experts=6)
    recipe = recipe_of("prune.experts", source, tmp_path)
    recipe["steps"] = [
        {"use": "prune.experts", "keep": 0.67},
        {"use": "prune.experts", "keep": 0.75},
        {"use": "quantize.rtn", "group_size": 16},
    ]
    result = engine.run(recipe, tmp_path / "out")
    assert json.loads((result.final / "config.json").read_text())["num_local_experts"] == 3


def test_what_cannot_be_taken_out_is_refused(tmp_path: Path) -> None:
    run = Run(calibration=CalibrationSource("tokens.safetensors"))
    llama = Artifact.open(models_zoo.write("llama", tmp_path))
    with pytest.raises(PlanError, match="has no experts"):
        Experts().check(llama, run)
    mixtral = Artifact.open(models_zoo.write("mixtral", tmp_path))
    with pytest.raises(PlanError, match="needs calibration text"):
        Experts().check(mixtral, Run())
    with pytest.raises(PlanError, match="4 of 4 experts are asked for"):
        Experts(keep=0.9).check(mixtral, run)
    with pytest.raises(PlanError, match="in multiples of 4"):
        Experts(multiple=4).check(mixtral, run)
    with pytest.raises(UsageError, match="less than 1"):
        build("prune.experts", {"keep": 1.0})


def test_a_router_with_more_than_parameters_is_refused(tmp_path: Path) -> None:
    config = transformers.DeepseekV3Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        max_position_embeddings=64,
    )
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path / "deepseek")
    run = Run(calibration=CalibrationSource("tokens.safetensors"))
    with pytest.raises(PlanError, match="no parameter and has an entry for each expert"):
        Experts().check(Artifact.open(tmp_path / "deepseek"), run)
