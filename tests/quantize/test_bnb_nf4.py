"""NF4 artifacts: the bytes that transformers would save, loaded by stock transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress import engine
from compress.core.artifact import Artifact
from compress.core.errors import EnvironmentFault, PlanError, UsageError, VerificationError
from compress.core.run import Run
from compress.sweep.verification import verify_weights
from tests import models_zoo
from tests.marks import slow_but
from tests.single_steps import tensors

FORMS: dict[str, dict[str, Any]] = {
    "bnb_nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "bnb_int8": {"load_in_8bit": True},
}
WIDE: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "qwen3": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
    "gemma2": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
    },
    "opt": {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "bert": {"hidden_size": 64, "intermediate_size": 128},
}
"""On a CPU that multiplies bfloat16, bitsandbytes runs NF4 in blocks of 64 columns and 32 rows, and stops at
narrower matrices."""


def made(method: str, model: Path, out: Path, **options: Any) -> Path:
    recipe = {"model": str(model), "device": "cpu", "steps": [{"use": f"quantize.{method}", **options}]}
    return engine.run(recipe, out, single=True).final


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("name", slow_but(("llama", "bert"), ("llama", "qwen3", "gemma2", "opt", "bert")))
def test_the_bytes_are_those_of_transformers(method: str, name: str, tmp_path: Path) -> None:
    model = models_zoo.write(name, tmp_path, dtype=torch.bfloat16, **WIDE[name])
    ours = made(method, model, tmp_path / "ours")
    kind = transformers.AutoModel if name in models_zoo.ENCODERS else transformers.AutoModelForCausalLM
    asked = transformers.BitsAndBytesConfig(**FORMS[method], llm_int8_skip_modules=_skipped(ours))
    theirs = kind.from_pretrained(model, quantization_config=asked, device_map="cpu")
    theirs.save_pretrained(tmp_path / "theirs")
    found, expected = tensors(ours), tensors(tmp_path / "theirs")
    assert set(found) == set(expected)
    for tensor in expected:
        assert torch.equal(found[tensor], expected[tensor]), tensor
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    assert json.loads((ours / "config.json").read_text())["quantization_config"] == config
    loaded = kind.from_pretrained(ours, dtype=torch.bfloat16)
    with torch.no_grad():
        tokens = models_zoo.tokens(2, 8)
        assert torch.equal(loaded(tokens)[0], theirs(tokens)[0])


def _skipped(folder: Path) -> list[str]:
    return list(
        json.loads((folder / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"] or []
    )


@pytest.mark.parametrize("method", FORMS)
def test_it_is_verified_and_its_damage_is_found(method: str, tmp_path: Path) -> None:
    folder = made(method, models_zoo.write("llama", tmp_path), tmp_path / "out")
    report = engine.verify(folder)
    assert report.weights is not None
    assert report.weights.changed == 21
    # One bit of one matrix, in a file that is otherwise whole.
    lineage = Artifact.open(folder).lineage
    assert lineage is not None
    for name, value in tensors(folder).items():
        if name.endswith("layers.1.mlp.up_proj.weight"):
            value.view(torch.uint8)[3, 0] ^= 1
            damaged = {**tensors(folder), name: value}
    for file in folder.glob("*.safetensors"):
        here = load_file(file)
        save_file({name: damaged[name] for name in here}, file, metadata={"format": "pt"})
    run = Run(task="text-generation")
    with pytest.raises(VerificationError, match=r"layers\.1\.mlp\.up_proj\.weight loads with other values"):
        verify_weights(Artifact.open(folder), lineage, run)


@pytest.mark.parametrize("method", FORMS)
def test_ignored_modules_stay_in_floats(method: str, tmp_path: Path) -> None:
    model = models_zoo.write("llama", tmp_path)
    folder = made(method, model, tmp_path / "out", ignore=["*.down_proj"])
    found, before = tensors(folder), tensors(model)
    for block in range(3):
        name = f"model.layers.{block}.mlp.down_proj.weight"
        assert torch.equal(found[name], before[name])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert type(loaded.model.layers[0].mlp.up_proj) is not torch.nn.Linear


@pytest.mark.parametrize("method", FORMS)
def test_what_cannot_be_held_is_refused_by_name(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PlanError, match="holds fused experts"):
        made(method, models_zoo.write("mixtral", tmp_path), tmp_path / "out")
    with pytest.raises(PlanError, match=r"c_attn.*bitsandbytes cannot hold"):
        made(method, models_zoo.write("gpt2", tmp_path), tmp_path / "out")
    llama = models_zoo.write("llama", tmp_path)
    with pytest.raises(UsageError, match="matches no module"):
        made(method, llama, tmp_path / "out", ignore=["*.down_proi"])
    monkeypatch.setattr("compress.formats.bitsandbytes.find_spec", lambda _: None)
    with pytest.raises(EnvironmentFault, match="needs bitsandbytes"):
        made(method, llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_magnitudes_may_stay_in_floats(tmp_path: Path) -> None:
    model = models_zoo.write("llama", tmp_path)
    held = tensors(made("bnb_nf4", model, tmp_path / "out", double_quantization=False))
    assert held["model.layers.0.mlp.up_proj.weight.absmax"].dtype == torch.float32
    assert not any("nested" in name for name in held)
