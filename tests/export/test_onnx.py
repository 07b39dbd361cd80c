"""The pass as its users run it: what is written, what is recorded, what is refused."""

import json
from pathlib import Path

import onnx
import pytest
import torch
import transformers

from compress import engine
from compress.core.artifact import Artifact
from compress.core.errors import EnvironmentFault, PlanError
from compress.core.facts import Fact
from compress.core.recipe import Recipe, Step
from compress.core.run import Run
from compress.export.onnx import Onnx
from compress.models.tasks import TASKS
from compress.runtimes import Placement, find
from tests import exported_models, models_zoo, quantized_models


def recipe(source: Path, **options: object) -> Recipe:
    return Recipe(model=str(source), threads=1, steps=(Step(use="export.onnx", **options),))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A classifier and what the engine made of it."""
    folder = tmp_path_factory.mktemp("export")
    source = exported_models.classifier(folder / "classifier")
    (source / "README.md").write_text("a model card", encoding="utf-8")
    engine.run(recipe(source), folder / "out", single=True)
    return source, folder / "out"


def test_the_folder_is_complete(folders: tuple[Path, Path]) -> None:
    source, out = folders
    names = {file.name for file in out.iterdir()}
    assert names >= {"model.onnx", "config.json", "tokenizer.json", "README.md", "compress.json"}
    assert "model.safetensors" not in names
    onnx.checker.check_model(out / "model.onnx")
    artifact = Artifact.open(out)
    assert artifact.facts == {Fact.ONNX_GRAPH}
    assert artifact.config == Artifact.open(source).config
    assert engine.verify(out).weights is None


def test_parity_is_recorded(folders: tuple[Path, Path]) -> None:
    lineage = Artifact.open(folders[1]).lineage
    assert lineage is not None
    decisions = lineage.steps[-1].decisions
    assert decisions["task"] == "text-classification"
    assert decisions["opset"] == 20
    assert decisions["integer_layers"] == 0
    parity = decisions["parity"]["graph"]
    assert parity["bound"] == 1e-4
    assert 0 < parity["error"] < 1e-5
    assert set(parity["cases"]) == {"one token", "odd length", "left padding", "right padding", "long"}


def test_it_classifies_as_the_model_does(folders: tuple[Path, Path]) -> None:
    source, out = folders
    artifact = Artifact.open(out)
    model = transformers.BertForSequenceClassification.from_pretrained(source).eval()
    session = find("onnxruntime").load(artifact, TASKS["text-classification"], Placement())
    tokens = models_zoo.tokens()
    with torch.no_grad():
        expected = model(tokens).logits
    assert session.outputs(tokens).shape == (4, 3)
    assert torch.allclose(session.outputs(tokens), expected, atol=1e-5)


def test_a_second_run_does_nothing(folders: tuple[Path, Path]) -> None:
    source, out = folders
    assert engine.run(recipe(source), out, single=True).did_nothing


def test_integer_weights_are_predicted_in_four_bits(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    packed = quantized_models.write(source, tmp_path / "after", bits=4, group=32)
    run = Run(threads=1)
    floats = Onnx().check(Artifact.open(source), run)
    integers = Onnx().check(Artifact.open(packed), run)
    half = Onnx(precision="float16").check(Artifact.open(source), run)
    assert floats.disk_bytes == 4 * sum(p.numel() for p in models_zoo.build("llama").parameters())
    assert half.disk_bytes == floats.disk_bytes // 2
    linear = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)
    assert integers.disk_bytes == floats.disk_bytes - 4 * linear + linear // 2 + 4 * linear // 32


def test_another_format_is_refused_when_it_is_planned(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq"}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(PlanError, match="stored as 'gptq'"):
        Onnx().check(Artifact.open(source), Run())


def test_two_graphs_are_refused_when_they_are_planned(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="is an encoder and a decoder, which would be two graphs"):
        Onnx().check(Artifact.open(models_zoo.write("t5", tmp_path)), Run())


@pytest.mark.parametrize(
    ("options", "words"),
    [({"activations": "dynamic"}, "quantizes the inputs"), ({"format": "fp8"}, "as small floats")],
)
def test_small_floats_and_quantized_inputs_are_refused_when_it_is_planned(
    options: dict[str, str], words: str, tmp_path: Path
) -> None:
    source = models_zoo.write("llama", tmp_path)
    rounding = {"model": str(source), "device": "cpu", "steps": [{"use": "quantize.rtn", **options}]}
    quantized = engine.run(rounding, tmp_path / "quantized", single=True).final
    for use in ("export.onnx", "export.gptq", "export.gguf"):
        recipe = Recipe(model=str(quantized), steps=(Step(use=use),))
        expected = words if use == "export.onnx" else r"quantizes input activations|stored as fp8 numbers"
        with pytest.raises(PlanError, match=expected):
            engine.plan(recipe, tmp_path / "out", single=True)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models_zoo.write("llama", tmp_path)
    monkeypatch.setattr("compress.graph.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(EnvironmentFault, match="ONNX needs onnxscript") as caught:
        Onnx().check(Artifact.open(source), Run())
    assert "compress-models[onnx]" in caught.value.hint


def test_nothing_may_follow_but_a_bench(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    steps = (Step(use="export.onnx"), Step(use="quantize.rtn"))
    with pytest.raises(PlanError, match=r"needs .*, which export\.onnx takes away"):
        engine.plan(Recipe(model=str(source), steps=steps), tmp_path / "out")


@pytest.mark.slow
def test_a_trained_model_through_rounding_and_export(shared: Path, tmp_path: Path) -> None:
    steps = (Step(use="quantize.rtn", bits=4, group_size=32), Step(use="export.onnx"))
    source = shared / "models" / "gutenberg-4m"
    result = engine.run(Recipe(model=str(source), threads=1, steps=steps), tmp_path / "out")
    final = Artifact.open(result.final)
    assert final.lineage is not None
    decisions = final.lineage.steps[-1].decisions
    assert decisions["integer_layers"] == 28
    parity = decisions["parity"]
    assert parity["weights"] == "exact"
    assert parity["exact_products"]["error"] < 1e-5
    assert parity["exact_products"]["greedy_tokens"] == 2 * 64
    assert parity["graph"]["agreement"] > 0.97
    assert "quantization_config" not in final.config
    assert (result.final / "tokenizer.json").is_file()
    size = (result.final / "model.onnx").stat().st_size
    # The tied embedding stays a float32: 4 MiB of 6.7 MB.
    assert size < 0.45 * 4 * 4.2e6
