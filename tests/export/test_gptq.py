"""The pass as its users run it: what is written, what is verified, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import engine
from compress.core.artifact import Artifact
from compress.core.errors import PlanError, VerificationError
from compress.core.facts import Fact
from compress.core.recipe import Recipe, Step
from compress.core.run import Run
from compress.export.gptq import Gptq
from compress.formats.gptq import Gptq as Format
from compress.sweep.verification import verify_weights
from tests import models_zoo, packed_models


def recipe(source: Path, use: str = "export.gptq", **options: object) -> Recipe:
    return Recipe(model=str(source), threads=1, device="cpu", steps=(Step(use=use, **options),))


def converted(source: Path, out: Path, **options: object) -> Path:
    engine.run(recipe(source, **options), out, single=True)
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The values of every layer of a GPTQ folder, read back."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    stems = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    local = ("qweight", "qzeros", "scales", "g_idx")
    return {
        stem: Format().read({part: tensors[f"{stem}.{part}"] for part in local}, stem, config).value()
        for stem in stems
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A float model, what the compressed-tensors library made of it, and that as GPTQ."""
    root = tmp_path_factory.mktemp("gptq")
    floats = packed_models.floats("llama-biased", root / "floats")
    source = packed_models.integers(floats, root / "integers")
    (source / "README.md").write_text("a model card", encoding="utf-8")
    return floats, source, converted(source, root / "out")


def test_the_folder_is_complete(folders: tuple[Path, Path, Path]) -> None:
    _, source, out = folders
    artifact = Artifact.open(out)
    assert artifact.facts == {Fact.GPTQ_CHECKPOINT, Fact.INTEGER_WEIGHTS}
    assert (out / "README.md").read_text(encoding="utf-8") == "a model card"
    written = json.loads((out / "quantize_config.json").read_text(encoding="utf-8"))
    assert written == artifact.config["quantization_config"]
    assert written["checkpoint_format"] == "gptq"
    assert {key: value for key, value in artifact.config.items() if key != "quantization_config"} == {
        key: value for key, value in Artifact.open(source).config.items() if key != "quantization_config"
    }


def test_the_integers_are_the_same(folders: tuple[Path, Path, Path]) -> None:
    _, source, out = folders
    expected = packed_models.dequantized(source)
    found = weights(out)
    assert len(found) == 14
    for stem, value in found.items():
        assert torch.equal(value.double(), expected[f"{stem}.weight"])
    assert min(float(load_file(out / "model.safetensors")[f"{stem}.scales"].min()) for stem in found) < 0


def test_everything_else_is_untouched(folders: tuple[Path, Path, Path]) -> None:
    _, source, out = folders
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    shared = before.keys() & after.keys()
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.bias", "lm_head.weight"} <= shared
    assert all(torch.equal(before[name], after[name]) for name in shared)
    assert not any(".weight_" in name for name in after)


def test_verification_reads_it_back(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    out = folders[2]
    verified = engine.verify(out).weights
    assert verified is not None
    assert verified.changed == 14
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in out.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.qzeros"][0, 0] += 1
    save_file(tensors, damaged / "model.safetensors")
    artifact = Artifact.open(damaged)
    assert artifact.lineage is not None
    with pytest.raises(VerificationError, match=r"layers\.1\.mlp\.down_proj\.weight reads back with other"):
        verify_weights(artifact, artifact.lineage, Run())
    tensors["model.layers.9.mlp.down_proj.bias"] = torch.zeros(2)
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(VerificationError, match=r"layers\.9\.mlp\.down_proj\.bias is on disk"):
        verify_weights(Artifact.open(damaged), artifact.lineage, Run())


def test_the_same_inputs_give_the_same_bytes(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    again = converted(folders[1], tmp_path / "again")
    assert Artifact.open(again).digest == Artifact.open(folders[2]).digest
    assert engine.run(recipe(folders[1]), again, single=True).did_nothing


def test_zero_points_take_version_2(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source = packed_models.integers(folders[0], tmp_path / "integers", bits=3, symmetric=False)
    out = converted(source, tmp_path / "out")
    assert Artifact.open(out).config["quantization_config"]["checkpoint_format"] == "gptq_v2"
    expected = packed_models.dequantized(source)
    for stem, value in weights(out).items():
        assert torch.equal(value.double(), expected[f"{stem}.weight"])


def test_layers_that_differ_and_layers_in_floats(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    options = {
        "bits": 4,
        "group_size": 32,
        "overrides": [{"match": "*.down_proj", "bits": 8, "group_size": "channel"}],
        "ignore": ["*.layers.1.self_attn.o_proj"],
    }
    engine.run(recipe(folders[0], "quantize.rtn", **options), tmp_path / "integers", single=True)
    out = converted(tmp_path / "integers", tmp_path / "out")
    assert engine.verify(out).weights is not None
    rules = Artifact.open(out).config["quantization_config"]["dynamic"]
    assert list(rules.values()) == [{}, *[{"bits": 8, "group_size": -1, "sym": True}] * 2]
    expected = packed_models.dequantized(tmp_path / "integers")
    found = weights(out)
    assert len(found) == 13
    assert all(torch.equal(value.double(), expected[f"{stem}.weight"]) for stem, value in found.items())


def test_shards_stay_shards(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    engine.run(recipe(folders[0], "quantize.rtn", bits=8, group_size=32), tmp_path / "integers", single=True)
    out = converted(tmp_path / "integers", tmp_path / "out")
    shards = {file.name for file in (tmp_path / "integers").glob("*.safetensors")}
    assert len(shards) == 3
    assert {file.name for file in out.glob("*.safetensors")} == shards
    assert len(weights(out)) == 14


def test_float32_models_are_refused_unless_rounding_is_allowed(tmp_path: Path) -> None:
    floats = packed_models.floats("llama", tmp_path / "floats", torch.float32)
    source = packed_models.integers(floats, tmp_path / "integers")
    with pytest.raises(PlanError, match=r"model\.layers\.0\..* are not exact in float16"):
        converted(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = converted(source, tmp_path / "out", inexact="round")
    lineage = Artifact.open(out).lineage
    assert lineage is not None
    assert 0 < lineage.steps[-1].decisions["largest_scale_change"] < 2.0**-10


def test_what_cannot_be_held_is_refused_when_it_is_planned(tmp_path: Path) -> None:
    floats = models_zoo.write("llama", tmp_path)
    for options, message in (
        ({"bits": 4, "group": 8}, "not of 8"),
        ({"bits": 3, "group": 32}, "16 outputs of 3 bits"),
    ):
        source = packed_models.integers(floats, tmp_path / f"{options['bits']}", **options)
        with pytest.raises(PlanError, match=message):
            Gptq().check(Artifact.open(source), Run())
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    weights_ = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = weights_
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(PlanError, match="quantizes input activations"):
        Gptq().check(Artifact.open(source), Run())


def test_what_follows_gets_a_clear_refusal(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    steps = (Step(use="export.gptq"), Step(use="export.awq"))
    with pytest.raises(PlanError, match=r"needs a transformers model folder, which export\.gptq takes away"):
        engine.plan(Recipe(model=str(folders[1]), steps=steps), tmp_path / "out")
    with pytest.raises(PlanError, match="needs a transformers model folder"):
        engine.plan(recipe(folders[2], "export.onnx"), tmp_path / "out", single=True)


def test_the_prediction_is_what_is_written(folders: tuple[Path, Path, Path]) -> None:
    needs = Gptq().check(Artifact.open(folders[1]), Run())
    size = (folders[2] / "model.safetensors").stat().st_size
    assert size - 20_000 < needs.disk_bytes <= size
