"""Rounders on every architecture: what is written loads in stock transformers as what was meant."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from compress import engine
from compress.core.artifact import Artifact, Lineage, StepRecord
from compress.core.errors import PlanError, UsageError
from compress.core.passes import Outcome, Pass
from compress.core.run import Run
from compress.quantize.rtn import Rtn
from compress.sweep.rounder import Override
from compress.sweep.verification import Verified, verify_weights
from tests import models_zoo

REFUSED = (*models_zoo.WITHOUT_LINEAR_LAYERS, "gpt-oss")


def apply(method: Pass, source: Artifact, target: Path) -> tuple[Outcome, Verified]:
    """Check, apply and verify as the engine does."""
    target.mkdir()
    run = Run(scratch=target / ".progress")
    method.check(source, run)
    outcome = method.apply(source, target, run)
    artifact = Artifact.open(target)
    record = StepRecord(
        "quantize.rtn", method.model_dump(mode="json"), "key", artifact.digest, {}, outcome.decisions
    )
    lineage = Lineage(source.digest, (record,), outcome.tensors)
    return outcome, verify_weights(artifact, lineage, run, source)


def loaded(folder: Path) -> Any:
    """The model as its users load it, made dense by its first forward pass."""
    kind = transformers.AutoModel if "For" not in _architecture(folder) else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder)
    with torch.no_grad():
        model(input_ids=models_zoo.tokens(1, 4))
    return model


def _architecture(folder: Path) -> str:
    return str(Artifact.open(folder).config["architectures"][0]).replace("LMHeadModel", "ForCausalLM")


@pytest.mark.parametrize("name", [name for name in models_zoo.CONFIGURATIONS if name not in REFUSED])
def test_rounded_weights_load_in_stock_transformers(name: str, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write(name, tmp_path))
    outcome, verified = apply(Rtn(bits=8, group_size=16), source, tmp_path / "out")
    assert verified.changed == outcome.decisions["changed"] > 0
    before, after = loaded(source.path).state_dict(), loaded(tmp_path / "out").state_dict()
    changed = 0
    for weight, value in before.items():
        if torch.equal(value, after[weight]):
            continue
        changed += 1
        # Half a step of an 8-bit scale, which is at most amax / 127.
        assert float((value - after[weight]).abs().max()) <= float(value.abs().max()) / 127 * 0.51, weight
    assert changed > 0


@pytest.mark.parametrize("name", REFUSED)
def test_weights_that_the_format_cannot_hold_are_refused_by_name(name: str, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write(name, tmp_path))
    with pytest.raises(PlanError, match=r"(c_attn|experts\.gate_up_proj).*compressed-tensors cannot hold"):
        Rtn(group_size=16).check(source, Run())


def test_experts_that_cannot_be_held_may_be_left_out_by_name(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("gpt-oss", tmp_path))
    outcome, _ = apply(Rtn(group_size=16, ignore=("*.experts",)), source, tmp_path / "out")
    assert outcome.decisions["kept"]["model.layers.0.mlp.experts.gate_up_proj"] == "ignored"
    assert outcome.decisions["changed"] == 3 * 4  # q, k, v, o of three blocks


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_fused_experts_are_compressed_as_experts(name: str, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write(name, tmp_path))
    outcome, _ = apply(Rtn(group_size=16), source, tmp_path / "out")
    packed = [weight for weight, meant in outcome.tensors.items() if ".experts." in weight and meant.changed]
    assert len(packed) == 3 * 4 * 3  # blocks, experts, projections
    assert not [
        weight for weight, meant in outcome.tensors.items() if ".experts." in weight and not meant.changed
    ]


@pytest.mark.parametrize(
    ("bits", "symmetric", "group"), [(2, False, 16), (3, True, "channel"), (4, False, "channel")]
)
def test_other_schemes(bits: int, symmetric: bool, group: Any, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path, dtype=torch.bfloat16))
    _, verified = apply(Rtn(bits=bits, symmetric=symmetric, group_size=group), source, tmp_path / "out")
    assert verified.changed == 3 * 7
    assert loaded(tmp_path / "out").dtype == torch.bfloat16


def test_a_tied_head_is_rounded_on_its_own(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama-tied", tmp_path))
    apply(Rtn(group_size=16, include=("lm_head",)), source, tmp_path / "out")
    model = loaded(tmp_path / "out")
    original = loaded(source.path)
    assert torch.equal(model.model.embed_tokens.weight, original.model.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert model.config.tie_word_embeddings is False


def test_a_tied_embedding_alone_is_refused(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama-tied", tmp_path))
    with pytest.raises(PlanError, match="shares its weight with lm_head"):
        Rtn(group_size=16, include=("*embed_tokens",)).check(source, Run())


def test_a_tied_embedding_and_its_head_are_rounded_together(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama-tied", tmp_path))
    outcome, _ = apply(Rtn(group_size=16, include=("*embed_tokens", "lm_head")), source, tmp_path / "out")
    assert outcome.decisions["changed"] == 3 * 7 + 2
    model = loaded(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_group_that_does_not_divide_is_refused_by_name_or_falls_back(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    with pytest.raises(PlanError, match=r"q_proj has 32 columns, which groups of 24 do not divide"):
        Rtn(group_size=24).check(source, Run())
    outcome, _ = apply(Rtn(group_size=64, fallback="channel"), source, tmp_path / "out")
    schemes = {row["scheme"] for row in outcome.decisions["layers"].values()}
    assert schemes == {"int4 channel symmetric", "int4 group 64 symmetric"}


def test_overrides_and_ignored_modules(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    method = Rtn(
        group_size=16,
        ignore=("model.layers.0.*",),
        overrides=(Override(match="*.down_proj", bits=8), Override(match="re:.*layers\\.2.*", group_size=32)),
    )
    outcome, _ = apply(method, source, tmp_path / "out")
    layers = outcome.decisions["layers"]
    assert layers["model.layers.1.mlp.down_proj"]["scheme"] == "int8 group 16 symmetric"
    assert layers["model.layers.2.mlp.down_proj"]["scheme"] == "int8 group 32 symmetric"
    assert layers["model.layers.2.mlp.up_proj"]["scheme"] == "int4 group 32 symmetric"
    assert not any(name.startswith("model.layers.0") for name in layers)
    loaded(tmp_path / "out")


@pytest.mark.parametrize("field", ["ignore", "include"])
def test_a_pattern_that_matches_nothing_is_refused(field: str, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    with pytest.raises(UsageError, match="matches no module"):
        Rtn(group_size=16, **{field: ("lm_haed",)}).check(source, Run())


def test_experts_with_different_schemes_are_refused(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("mixtral", tmp_path))
    method = Rtn(group_size=16, overrides=(Override(match="*.down_proj.*", bits=8),))
    with pytest.raises(PlanError, match="all experts with one scheme"):
        method.check(source, Run())


def test_an_asymmetric_model_loads_without_arguments(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    apply(Rtn(group_size=16, symmetric=False), source, tmp_path / "out")
    weight = loaded(tmp_path / "out").model.layers[0].mlp.up_proj.weight
    assert len(weight[0, :16].unique()) <= 16
    with pytest.raises(PlanError, match="one scheme"):
        Rtn(group_size=16, symmetric=False, overrides=(Override(match="*.up_proj", bits=8),)).check(
            replace(source), Run()
        )


@pytest.mark.parametrize("tied", [True, False])
def test_a_calibrated_method_rounds_head_and_embedding_when_asked(tied: bool, tmp_path: Path) -> None:
    model = models_zoo.write("llama-tied" if tied else "llama", tmp_path)
    save_file({"input_ids": models_zoo.tokens(16, 32)}, tmp_path / "tokens.safetensors")
    step = {"use": "quantize.gptq", "group_size": 16, "include": ["lm_head", "*embed_tokens"]}
    data = {"calibration": str(tmp_path / "tokens.safetensors"), "samples": 16, "sequence_length": 32}
    result = engine.run({"model": str(model), "steps": [step], "data": data}, tmp_path / "out", single=True)
    lineage = Artifact.open(result.final).lineage
    assert lineage is not None
    layers = lineage.steps[-1].decisions["layers"]
    assert len(layers) == 3 * 7 + 2
    # The head is multiplied with every hidden state; a row of the embedding is only looked up.
    assert layers["lm_head"]["tokens"] == 16 * 32
    assert "tokens" not in layers["model.embed_tokens"]
    loaded(result.final)
