from pathlib import Path
from typing import Any

import pytest

from compress.core.artifact import Artifact
from compress.core.passes import Needs, build
from compress.core.run import Run
from compress.models.load import skeleton
from compress.training.prediction import Shape, chunk_of, predict
from compress.training.student import Student
from tests import models_zoo
from tests.together import environment


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("llama-tied", True)])
def test_a_shape_counts_what_is_multiplied_and_no_lookup(name: str, tied: bool) -> None:
    shape = Shape.of(models_zoo.build(name))
    block = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 64
    assert shape.multiplied == 3 * block + 96 * 32
    assert shape.parameters == 3 * (block + 64) + 32 + 96 * 32 * (1 if tied else 2)
    assert shape.vocabulary == 96
    assert shape.widths == 3 * (64 + 2 * 48 + 64 + 3 * 96)
    assert (shape.blocks, shape.width) == (3, 32)


def test_a_skeleton_has_the_shape_of_its_model(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("mixtral", tmp_path))
    assert Shape.of(skeleton(source)) == Shape.of(Student(source, Run()).model)


def test_chunks_are_smaller_for_larger_vocabularies_but_not_too_small() -> None:
    assert chunk_of(4096, "cpu") == 256
    assert chunk_of(4096, "cuda") > chunk_of(4096, "cpu")
    assert chunk_of(256_000, "cpu") == 256


def predicted(folder: Path, **options: Any) -> Needs:
    source = Artifact.open(folder / "llama")
    numbers: Any = build("distill.logits", {"window": 512, "batch": 64, "tokens": 100_000, **options})
    shape = Shape.of(skeleton(source))
    return predict(numbers, source, shape, None, "float32", "cpu", 64)


def test_blocks_that_are_computed_again_keep_less_and_take_longer(tmp_path: Path) -> None:
    models_zoo.write("llama", tmp_path)
    kept, again = predicted(tmp_path), predicted(tmp_path, activations="recompute")
    widths = 3 * (64 + 2 * 48 + 64 + 3 * 96)
    assert kept.host_bytes - again.host_bytes == 64 * 512 * 4 * (widths - 3 * 32 - widths // 3)


def test_processes_share_a_step_and_the_memory_of_their_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models_zoo.write("llama", tmp_path)
    alone = predicted(tmp_path)
    half = predicted(tmp_path, batch=32)
    for name, value in environment(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    # Twice a process that has half of the windows.
    assert predicted(tmp_path).host_bytes == 2 * half.host_bytes
    assert predicted(tmp_path).disk_bytes == alone.disk_bytes
