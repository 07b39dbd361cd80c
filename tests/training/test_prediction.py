from pathlib import Path

import pytest

from compress.core.artifact import Artifact
from compress.core.run import Run
from compress.models.load import skeleton
from compress.training.prediction import Shape, chunk_of
from compress.training.student import Student
from tests import models_zoo


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("llama-tied", True)])
def test_a_shape_counts_what_is_multiplied_and_no_lookup(name: str, tied: bool) -> None:
    shape = Shape.of(models_zoo.build(name))
    block = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 64
    assert shape.multiplied == 3 * block + 96 * 32
    assert shape.parameters == 3 * (block + 64) + 32 + 96 * 32 * (1 if tied else 2)
    assert shape.vocabulary == 96
    assert shape.widths == 3 * (64 + 2 * 48 + 64 + 3 * 96)


def test_a_skeleton_has_the_shape_of_its_model(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("mixtral", tmp_path))
    assert Shape.of(skeleton(source)) == Shape.of(Student(source, Run()).model)


def test_chunks_are_smaller_for_larger_vocabularies_but_not_too_small() -> None:
    assert chunk_of(4096, "cpu") == 256
    assert chunk_of(4096, "cuda") > chunk_of(4096, "cpu")
    assert chunk_of(256_000, "cpu") == 128
