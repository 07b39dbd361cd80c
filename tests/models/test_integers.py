"""Quantized matrices are found by their tensors and brought home to their modules."""

from pathlib import Path

from compress.core.artifact import Artifact
from compress.models.checkpoint import Checkpoint
from compress.models.integers import integer_matrices, module_of
from compress.models.load import skeleton
from tests import models_zoo, quantized_models


def test_a_matrix_is_told_by_its_scale() -> None:
    names = ["a.weight_packed", "a.weight_scale", "a.weight_shape", "b.weight", "b.weight_scale", "c.weight"]
    assert integer_matrices(names) == {
        "a": {
            "weight_packed": "a.weight_packed",
            "weight_scale": "a.weight_scale",
            "weight_shape": "a.weight_shape",
        },
        "b": {"weight": "b.weight", "weight_scale": "b.weight_scale"},
    }


def test_every_matrix_has_its_module(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    artifact = Artifact.open(quantized_models.write(source, tmp_path / "after", bits=4, group=16))
    model = skeleton(artifact)
    checkpoint = Checkpoint(artifact, model)
    stems = integer_matrices(checkpoint.names)
    assert len(stems) == 21
    assert [module_of(model, checkpoint, stem) for stem in stems] == list(stems)
