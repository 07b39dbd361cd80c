"""Rounders on every architecture: what is written loads in stock transformers as what was meant."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress import engine
from compress.core.artifact import Artifact, Lineage, StepRecord
from compress.core.errors import PlanError, UsageError, VerificationError
from compress.core.passes import Outcome, Pass
from compress.core.run import Run
from compress.quantize.rtn import Rtn
from compress.sweep.rounder import Override
from compress.sweep.verification import Verified, verify_weights
from tests import models_zoo
from tests.marks import slow_but
from tests.single_steps import tensors

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


@pytest.mark.parametrize(
    "name",
    slow_but(
        ("llama", "gemma2", "mixtral", "bert"),
        [name for name in models_zoo.CONFIGURATIONS if name not in REFUSED],
    ),
)
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


def test_experts_that_transformers_would_not_load_are_refused_when_it_is_planned(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("mixtral", tmp_path))
    with pytest.raises(PlanError, match="without zero points") as refusal:
        Rtn(group_size=16, symmetric=False).check(source, Run())
    assert "symmetrically" in refusal.value.hint
    # It unpacks experts before it merges them, and drops those that are floats.
    with pytest.raises(PlanError, match=r"layers\.0\.mlp\.experts: .* would not load these floats"):
        Rtn(group_size=16, ignore=("*.experts",)).check(source, Run())


@pytest.mark.parametrize("name", slow_but(("mixtral",), ("mixtral", "qwen2-moe", "qwen3-moe")))
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


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_calibrated_method_rounds_head_and_embedding_when_asked(tied: bool, tmp_path: Path) -> None:
    model = models_zoo.write("llama-tied" if tied else "llama", tmp_path)
    save_file({"input_ids": models_zoo.tokens(16, 32)}, tmp_path / "tokens.safetensors")
    step = {"use": "quantize.gptq", "group_size": 16, "include": ["lm_head", "*embed_tokens"]}
    step |= {"clip": "none", "refinement": 0}
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


SMALL: list[dict[str, Any]] = [
    {"activations": "dynamic"},
    {"activations": "static"},
    {"format": "fp8"},
    {"format": "fp8", "activations": "static"},
    {"format": "nvfp4"},
    {"format": "nvfp4", "activations": "static"},
    {"format": "mxfp4", "activations": "dynamic"},
]


def run_rtn(source: Path, out: Path, use: str = "quantize.rtn", **options: Any) -> Artifact:
    """Plan, round and verify as the command does."""
    tokens = out.parent / "tokens.safetensors"
    save_file({"input_ids": models_zoo.tokens(8, 16)}, tokens)
    recipe = {
        "model": str(source),
        "device": "cpu",
        "threads": 1,
        "steps": [{"use": use, **options}],
        "data": {"calibration": str(tokens), "samples": 8, "sequence_length": 16, "batch_size": 4},
    }
    return Artifact.open(engine.run(recipe, out, single=True).final)


@pytest.mark.parametrize(
    ("name", "options"),
    slow_but(
        [("llama", SMALL[number]) for number in (0, 3, 4, 6)],
        [*(("llama", options) for options in SMALL), ("bert", SMALL[1])],
    ),
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()),
)
def test_small_numbers_load_in_stock_transformers(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    source = models_zoo.write(name, tmp_path, dtype=torch.bfloat16)
    artifact = run_rtn(source, tmp_path / "out", **options)
    before, after = loaded(source).state_dict(), loaded(artifact.path).state_dict()
    changed = [weight for weight, value in before.items() if not torch.equal(value, after[weight])]
    assert artifact.lineage is not None
    assert len(changed) == artifact.lineage.steps[-1].decisions["changed"] > 0
    four = options.get("format") in ("nvfp4", "mxfp4")
    for weight in changed:
        distance = (after[weight].float() - before[weight].float()).norm() / before[weight].float().norm()
        assert float(distance) < (0.16 if four else 0.04), weight
    assert all(str(value.dtype) == "torch.bfloat16" for value in after.values() if value.dim() > 1)


def test_four_bit_floats_of_another_dtype_are_dequantized_while_they_load(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path, dtype=torch.float32)
    artifact = run_rtn(source, tmp_path / "out", format="nvfp4")
    assert artifact.config["quantization_config"]["dequantize"] is True
    assert loaded(artifact.path).model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    with pytest.raises(PlanError, match="bfloat16, and the model is float32"):
        run_rtn(source, tmp_path / "other", format="mxfp4", activations="dynamic")


def test_matrices_of_one_product_share_scales(tmp_path: Path) -> None:
    """Servers multiply with query, key and value at once, and take one scale of a whole tensor for them."""
    source = models_zoo.write("llama", tmp_path, dtype=torch.bfloat16)
    written = tensors(run_rtn(source, tmp_path / "out", format="nvfp4", activations="static").path)
    for part, readers in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))):
        stems = [f"model.layers.1.{part}.{reader}" for reader in readers]
        assert len({float(written[f"{stem}.weight_global_scale"]) for stem in stems}) == 1
        assert len({float(written[f"{stem}.input_global_scale"]) for stem in stems}) == 1
    assert float(written["model.layers.1.self_attn.o_proj.input_global_scale"]) != float(
        written["model.layers.1.self_attn.q_proj.input_global_scale"]
    )


def test_fixed_scales_are_the_largest_input_that_calibration_saw(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    written = tensors(run_rtn(source, tmp_path / "out", format="fp8", activations="static").path)
    model, seen = transformers.AutoModelForCausalLM.from_pretrained(source), []
    first = model.model.layers[0].self_attn.q_proj
    first.register_forward_pre_hook(lambda _, args: seen.append(float(args[0].abs().max())))
    with torch.no_grad():
        model(models_zoo.tokens(8, 16))
    scale = float(written["model.layers.0.self_attn.q_proj.input_scale"])
    assert scale == pytest.approx(max(seen) / 448, rel=1e-5)


@pytest.mark.parametrize("use", ["quantize.gptq", "quantize.autoround", "quantize.hqq"])
def test_every_rounder_writes_fixed_scales_of_inputs(use: str, tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    more = {"iterations": 2} if use == "quantize.autoround" else {}
    artifact = run_rtn(source, tmp_path / "out", use, activations="static", **more)
    assert artifact.config["quantization_config"]["format"] == "int-quantized"
    scales = [name for name in tensors(artifact.path) if name.endswith("input_scale")]
    assert len(scales) == 7 * 3


def test_static_activations_without_text_are_refused_before_anything_starts(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    recipe = {"model": str(source), "steps": [{"use": "quantize.rtn", "activations": "static"}]}
    with pytest.raises(PlanError, match="static activations need calibration text"):
        engine.run(recipe, tmp_path / "out", single=True)
    assert not (tmp_path / "out").exists()


def test_a_wrong_scale_of_inputs_is_found(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    artifact = run_rtn(source, tmp_path / "out", activations="static")
    assert artifact.lineage is not None
    file = next(file for file in artifact.weight_files if "input_scale" in str(list(load_file(file))))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("input_scale"))
    tensors[name][:] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"input_scale loads as 0"):
        verify_weights(Artifact.open(artifact.path), artifact.lineage, Run())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mixtral", {"format": "fp8"}, "reads experts as integers alone"),
        ("llama-tied", {"activations": "dynamic", "include": ("lm_head", "*embed_tokens")}, "is looked up"),
        ("modernbert", {"format": "mxfp4", "activations": "dynamic"}, "leave its inputs unquantized"),
        ("phi", {"format": "mxfp4", "fallback": "channel"}, None),
    ],
)
def test_small_numbers_that_nothing_would_load_are_refused(
    name: str, options: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    source = Artifact.open(models_zoo.write(name, tmp_path, dtype=torch.bfloat16))
    if message is None:
        assert Rtn(**options).check(source, Run()).disk_bytes > 0
        return
    with pytest.raises(PlanError, match=message):
        Rtn(**options).check(source, Run())


def test_groups_of_a_float_format_do_not_become_rows(tmp_path: Path) -> None:
    model = models_zoo.configuration("llama")
    model.intermediate_size = 40
    transformers.LlamaForCausalLM(model).save_pretrained(tmp_path / "model")
    with pytest.raises(PlanError, match=r"40 columns, which groups of 16.*another --format"):
        Rtn(format="nvfp4", fallback="channel").check(Artifact.open(tmp_path / "model"), Run())
