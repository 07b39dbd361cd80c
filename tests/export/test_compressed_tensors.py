"""From GPTQ back to compressed-tensors: the same bytes, and what has no place there is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress import engine
from compress.core.artifact import LAYERS_FILE, LINEAGE_FILE, RUN_FILE, Artifact
from compress.core.errors import PlanError
from compress.core.facts import Fact
from compress.core.recipe import Recipe, Step
from compress.core.run import Run
from compress.export.compressed_tensors import CompressedTensors
from tests import models_zoo, packed_models

RECORDS = (LINEAGE_FILE, RUN_FILE, LAYERS_FILE)


def run(source: Path, out: Path, use: str, **options: Any) -> Path:
    step = Step(use=use, **options)
    engine.run(Recipe(model=str(source), threads=1, device="cpu", steps=(step,)), out, single=True)
    return out


def back(source: Path, folder: Path, **options: Any) -> Path:
    """A model of integers as GPTQ, and that as compressed-tensors."""
    gptq = run(source, folder / "gptq", "export.gptq", **options)
    return run(gptq, folder / "back", "export.compressed_tensors")


def edit(folder: Path, **changes: Any) -> None:
    """Change what the configuration of a GPTQ folder says; ``None`` takes a word out."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = config["quantization_config"] | changes
    config["quantization_config"] = {key: value for key, value in quantization.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ folder without our records, as another tool would leave it."""
    place = tmp_path_factory.mktemp("foreign")
    floats = packed_models.floats("llama", place / "floats")
    integers = run(floats, place / "integers", "quantize.rtn", bits=4, group_size=32)
    folder = run(integers, place / "foreign", "export.gptq")
    for name in RECORDS:
        (folder / name).unlink(missing_ok=True)
    shards = {}
    for file in sorted(folder.glob("*.safetensors")):
        shards |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(shards, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def gptq(foreign: Path, tmp_path: Path) -> Path:
    """The same, free to be changed."""
    return shutil.copytree(foreign, tmp_path / "foreign")


@pytest.mark.parametrize(
    ("family", "options", "version"),
    [
        ("llama-biased", {"bits": 4, "group_size": 32}, "v1"),
        ("llama-tied", {"bits": 8, "group_size": "channel"}, "v2"),
        ("qwen3", {"bits": 2, "group_size": 32, "symmetric": False}, "v2"),
        (
            "llama",
            {
                "bits": 4,
                "group_size": 32,
                "overrides": [{"match": "*.down_proj", "bits": 8, "group_size": "channel"}],
                "ignore": ["*.layers.1.self_attn.o_proj"],
            },
            "v1",
        ),
    ],
)
def test_it_comes_back_to_the_same_bytes(
    family: str, options: dict[str, Any], version: str, tmp_path: Path
) -> None:
    floats = packed_models.floats(family, tmp_path / "floats")
    source = run(floats, tmp_path / "integers", "quantize.rtn", **options)
    (source / "README.md").write_text("a model card", encoding="utf-8")
    out = back(source, tmp_path, version=version)
    files = {file.name for file in source.iterdir() if file.name not in RECORDS}
    assert files == {file.name for file in out.iterdir() if file.name not in RECORDS}
    for name in sorted(files):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    assert Artifact.open(out).facts == {Fact.TRANSFORMERS, Fact.INTEGER_WEIGHTS}
    verified = engine.verify(out).weights
    assert verified is not None
    before = Artifact.open(source).lineage
    assert before is not None
    assert verified.changed == sum(entry.changed for entry in before.tensors.values())


def test_experts_come_back_too(tmp_path: Path) -> None:
    floats = models_zoo.write("mixtral", tmp_path)
    integers = run(floats, tmp_path / "integers", "quantize.rtn", bits=4, group_size=16)
    out = run(
        run(integers, tmp_path / "gptq", "export.gptq", inexact="round"),
        tmp_path / "out",
        "export.compressed_tensors",
    )
    lineage = Artifact.open(out).lineage
    assert lineage is not None
    assert any(".experts." in name for name, entry in lineage.tensors.items() if entry.changed)
    ours, theirs = (Artifact.open(folder).config["quantization_config"] for folder in (integers, out))
    assert ours == theirs


def test_a_checkpoint_of_an_older_tool_loads_in_stock_transformers(gptq: Path, tmp_path: Path) -> None:
    # Neither version nor packing is said, the order is and was never used, and every layer has a bias.
    edit(gptq, checkpoint_format=None, format=None, pack_dtype=None, meta=None, lm_head=None, desc_act=True)
    tensors = load_file(gptq / "model.safetensors")
    stems = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    tensors |= {f"{stem}.bias": torch.zeros(tensors[f"{stem}.scales"].shape[1]) for stem in stems}
    save_file(tensors, gptq / "model.safetensors", metadata={"format": "pt"})
    out = run(gptq, tmp_path / "out", "export.compressed_tensors")
    assert not (out / "quantize_config.json").exists()
    lineage = Artifact.open(out).lineage
    assert lineage is not None
    assert len(lineage.steps[-1].decisions["left_out"]) == len(stems) == 14
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = models_zoo.tokens(2, 8) % packed_models.VOCABULARY
    with torch.no_grad():
        found = model(tokens).logits.float()
        expected = packed_models.dense(out)(tokens).logits
    # transformers computes in bfloat16.
    assert float((found - expected).norm() / expected.norm()) < 0.02
    tensors[f"{stems[0]}.bias"][0] = 1
    save_file(tensors, gptq / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match=r"bias' is not zero, and LlamaForCausalLM has no place for it"):
        CompressedTensors().check(Artifact.open(gptq), Run())


def test_an_activation_order_is_refused_when_it_is_planned(gptq: Path, tmp_path: Path) -> None:
    tensors = load_file(gptq / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.g_idx"
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, gptq / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match=r"layers\.1\.mlp\.down_proj: its inputs are grouped in the order"):
        run(gptq, tmp_path / "out", "export.compressed_tensors")
    assert not (tmp_path / "out").exists()


def test_scales_that_the_model_does_not_hold_are_refused_unless_rounding_is_allowed(
    gptq: Path, tmp_path: Path
) -> None:
    tensors = load_file(gptq / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.scales"
    tensors[name][0, 0] = 1 + 2.0**-10
    save_file(tensors, gptq / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match=r"up_proj: 1 of \d+ are not exact in bfloat16") as caught:
        run(gptq, tmp_path / "out", "export.compressed_tensors")
    assert "--inexact round" in caught.value.hint
    out = run(gptq, tmp_path / "rounded", "export.compressed_tensors", inexact="round")
    lineage = Artifact.open(out).lineage
    assert lineage is not None
    assert lineage.steps[-1].decisions["largest_scale_change"] == pytest.approx(1 / 1025)


def test_the_prediction_is_what_is_written(gptq: Path, tmp_path: Path) -> None:
    needs = CompressedTensors().check(Artifact.open(gptq), Run())
    out = run(gptq, tmp_path / "out", "export.compressed_tensors")
    size = (out / "model.safetensors").stat().st_size
    assert size - 20_000 < needs.disk_bytes <= size


def test_a_folder_that_is_no_gptq_checkpoint_is_refused(foreign: Path, tmp_path: Path) -> None:
    recipe = Recipe(model=str(foreign.with_name("integers")), steps=(Step(use="export.compressed_tensors"),))
    with pytest.raises(PlanError, match="needs a GPTQ checkpoint"):
        engine.plan(recipe, tmp_path / "out", single=True)
