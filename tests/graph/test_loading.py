"""A model in float32 with its integers: exact, complete, and refused where it cannot be."""

from pathlib import Path

import pytest
import torch

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.graph.loading import load
from compress.models.tasks import TASKS
from compress.runtimes import Placement, find
from tests import models_zoo, quantized_models

WRITES = TASKS["text-generation"]


def test_quantized_weights_are_not_rounded_to_the_dtype_of_their_scales(tmp_path: Path) -> None:
    plain = models_zoo.write("llama", tmp_path, dtype=torch.bfloat16)
    source = Artifact.open(quantized_models.write(plain, tmp_path / "after", bits=8, group=32))
    loaded = load(source, WRITES)
    assert len(loaded.matrices) == 21
    assert loaded.dense == {}
    name, matrix = next(iter(loaded.matrices.items()))
    weight = loaded.model.get_submodule(name).weight
    assert weight.dtype == torch.float32
    assert matrix.scale.dtype == torch.bfloat16
    q = matrix.q.double().unflatten(1, (-1, 32))
    assert torch.equal(weight.double(), (q * matrix.scale.double()[..., None]).flatten(1))
    assert not torch.equal(weight, matrix.dequantize().float())


def test_a_float_model_is_that_of_transformers(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama-tied", tmp_path, dtype=torch.bfloat16))
    loaded = load(source, WRITES)
    tokens = models_zoo.tokens()
    expected = find("torch-eager").load(source, WRITES, Placement(dtype="float32")).outputs(tokens)
    with torch.no_grad():
        assert torch.equal(WRITES.outputs(loaded.model(**WRITES.batch(tokens))), expected)
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight


def test_what_no_operator_holds_stays_float_with_a_reason(tmp_path: Path) -> None:
    plain = models_zoo.write("llama", tmp_path)
    source = quantized_models.write(
        plain, tmp_path / "after", bits=8, group=8, leave=("self_attn", "lm_head")
    )
    loaded = load(Artifact.open(source), WRITES)
    assert loaded.matrices == {}
    assert len(loaded.dense) == 9
    assert set(loaded.dense.values()) == {
        "groups of 8 inputs; MatMulNBits takes blocks of 16, 32, 64, 128 or 256"
    }


def test_an_encoder_without_its_pooler(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = models_zoo.write("bert", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    task = TASKS["feature-extraction"]
    loaded = load(Artifact.open(folder), task)
    assert loaded.model.pooler is None
    assert task.outputs(loaded.model(**task.batch(models_zoo.tokens()))).shape == (4, 16, 32)


def test_packed_experts_are_refused(tmp_path: Path) -> None:
    from compress import engine
    from compress.core.recipe import Recipe, Step

    source = models_zoo.write("mixtral", tmp_path)
    steps = (Step(use="quantize.rtn", bits=8, group_size=32),)
    engine.run(Recipe(model=str(source), threads=1, steps=steps), tmp_path / "after", single=True)
    with pytest.raises(PlanError, match="one of several experts that transformers fuses"):
        load(Artifact.open(tmp_path / "after"), WRITES)
