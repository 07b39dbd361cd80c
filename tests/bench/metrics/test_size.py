"""Bytes and bits a parameter, by part, counted by hand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compress import engine
from compress.bench.metrics import Subject, find
from compress.bench.metrics.size import measure_size
from compress.core.artifact import Artifact
from compress.core.bench import Bench
from compress.models.tasks import resolve
from tests import models_zoo, quantized_models
from tests.marks import slow_but

WIDTH, HIDDEN, LAYERS, KEYS = 32, 64, 3, 16
ATTENTION = LAYERS * (2 * WIDTH * WIDTH + 2 * WIDTH * KEYS)
MLP = LAYERS * 3 * WIDTH * HIDDEN
NORM = (2 * LAYERS + 1) * WIDTH
VOCABULARY = models_zoo.VOCABULARY * WIDTH


def test_parts_of_a_float_model(tmp_path: Path) -> None:
    folder = models_zoo.write("llama", tmp_path)
    document = measure_size(Artifact.open(folder))
    assert document["bytes"] == (folder / "model.safetensors").stat().st_size
    assert document["parameters"] == ATTENTION + MLP + NORM + 2 * VOCABULARY
    parts = {part: entry["parameters"] for part, entry in document["parts"].items()}
    expected = {
        "embeddings": VOCABULARY,
        "attention": ATTENTION,
        "mlp": MLP,
        "norm": NORM,
        "head": VOCABULARY,
    }
    assert parts == expected
    assert {entry["bits_per_parameter"] for entry in document["parts"].values()} == {32.0}


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    document = measure_size(Artifact.open(models_zoo.write("llama-tied", tmp_path)))
    assert "head" not in document["parts"]
    assert document["parts"]["embeddings"]["parameters"] == VOCABULARY


@pytest.mark.parametrize(
    ("bits", "packing"), [(4, "pack-quantized"), (3, "pack-quantized"), (8, "int-quantized")]
)
def test_everything_stored_for_a_weight_counts(tmp_path: Path, bits: int, packing: str) -> None:
    source = models_zoo.write("llama", tmp_path)
    group = None if bits == 8 else 32
    folder = quantized_models.write(source, tmp_path / "after", bits=bits, group=group, packing=packing)
    document = measure_size(Artifact.open(folder))
    assert document["parts"]["mlp"]["parameters"] == MLP
    assert document["parts"]["attention"]["parameters"] == ATTENTION
    scales = LAYERS * (2 * HIDDEN + WIDTH) if group is None else MLP // 32
    shapes = 0 if packing == "int-quantized" else LAYERS * 3 * 2 * 8
    assert document["parts"]["mlp"]["bytes"] == MLP * bits // 8 + 4 * scales + shapes
    assert document["parts"]["embeddings"]["bits_per_parameter"] == 32.0


@pytest.mark.parametrize(
    "name",
    slow_but(
        ("gpt2", "mixtral", "bert"), ("gpt2", "opt", "gpt-neox", "mixtral", "bert", "modernbert", "gemma3")
    ),
)
def test_every_block_has_attention_and_a_feed_forward_part(name: str, tmp_path: Path) -> None:
    document = measure_size(Artifact.open(models_zoo.write(name, tmp_path)))
    parts = document["parts"]
    assert parts["attention"]["parameters"] > 0
    assert parts["mlp"]["parameters"] > parts["norm"]["parameters"] > 0
    assert parts["embeddings"]["parameters"] >= VOCABULARY // 2
    assert sum(part["parameters"] for part in parts.values()) == document["parameters"]


def test_a_model_whose_task_is_unknown_has_a_size_without_parts(tmp_path: Path) -> None:
    folder = models_zoo.write("llama", tmp_path)
    config = (folder / "config.json").read_text().replace("LlamaForCausalLM", "LlamaForSomething")
    (folder / "config.json").write_text(config)
    document = measure_size(Artifact.open(folder))
    assert document["parameters"] == ATTENTION + MLP + NORM + 2 * VOCABULARY
    assert "LlamaForSomething" in document["note"]


def test_the_metric_says_the_same(tmp_path: Path) -> None:
    artifact = Artifact.open(models_zoo.write("llama-tied", tmp_path))
    task = resolve("auto", artifact.config)
    found = find("size").measure(Subject(artifact=artifact, task=task, options=Bench()))
    assert found["size.bits_per_parameter"].value == 32.0
    assert found["size.head_bits_per_parameter"].reason == "the model has no such part"
    assert set(found) == {quantity.name for quantity in find("size").quantities}


@pytest.mark.parametrize(("method", "least", "most"), [("bnb_nf4", 4.1, 9.0), ("bnb_int8", 8.1, 9.0)])
def test_parameters_of_bitsandbytes_are_those_of_the_model(
    method: str, least: float, most: float, tmp_path: Path
) -> None:
    source = models_zoo.write("llama", tmp_path, dtype=torch.bfloat16)
    recipe = {"model": str(source), "device": "cpu", "steps": [{"use": f"quantize.{method}"}]}
    made = engine.run(recipe, tmp_path / "out", single=True).final
    before, after = measure_size(Artifact.open(source)), measure_size(Artifact.open(made))
    assert after["parameters"] == before["parameters"]
    # The levels and the state of a matrix weigh much beside a tiny one.
    assert least < after["parts"]["mlp"]["bits_per_parameter"] < 3 * most


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        pytest.param({"format": "fp8", "activations": "static"}, 8, marks=pytest.mark.slow),
        ({"format": "nvfp4", "activations": "static"}, 4.5),
        ({"format": "mxfp4"}, 4.25),
    ],
)
def test_small_floats_are_parameters_and_their_scales_are_not(
    options: dict[str, str], bits: float, tmp_path: Path
) -> None:
    source = models_zoo.write("llama", tmp_path, dtype=torch.bfloat16)
    tokens = tmp_path / "tokens.safetensors"
    save_file({"input_ids": models_zoo.tokens(4, 16)}, tokens)
    recipe = {
        "model": str(source),
        "device": "cpu",
        "steps": [{"use": "quantize.rtn", **options}],
        "data": {"calibration": str(tokens), "samples": 4, "sequence_length": 16},
    }
    folder = engine.run(recipe, tmp_path / "out", single=True).final
    size = measure_size(Artifact.open(folder))
    assert size["parameters"] == measure_size(Artifact.open(source))["parameters"]
    # Scales of rows and of whole tensors weigh something in a model as small as this.
    assert size["parts"]["mlp"]["bits_per_parameter"] == pytest.approx(bits, abs=0.5)
