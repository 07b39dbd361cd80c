"""The circumstances of a step: the models it names, and what of them enters key and lineage."""

from pathlib import Path
from typing import Any

import pytest

from compress.core.artifact import Artifact
from compress.core.errors import ModelError
from compress.core.passes import build
from compress.core.run import Run, TrainingSource
from compress.engine.steps import identified, step_circumstances, step_run
from tests import models_zoo


def test_a_method_that_names_no_model_is_itself(model: Path, tmp_path: Path) -> None:
    method = build("quantize.rtn", {})
    run = step_run(method, Artifact.open(model), Run(training=TrainingSource("t.txt")), tmp_path)
    assert run.models == {}
    assert run.scratch == tmp_path
    assert identified(method, run) is method
    assert set(step_circumstances(method, Artifact.open(model), run)) == {"task", "device", "threads"}


def test_a_teacher_is_found_and_known_by_what_it_holds(model: Path, tmp_path: Path) -> None:
    other = models_zoo.write("llama", tmp_path, seed=3)
    source = Artifact.open(model)

    def known(teacher: str) -> Any:
        method = build("distill.logits", {"teacher": teacher})
        return identified(method, step_run(method, source, Run(), tmp_path)).model_dump()["teacher"]

    assert known("$model") == known(str(model)) == f"sha256:{source.digest}"
    assert known(str(other)) == f"sha256:{Artifact.open(other).digest}"
    with pytest.raises(ModelError):
        known(str(tmp_path / "absent"))


def test_training_text_and_arithmetic_are_part_of_what_is_computed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words")
    method = build("distill.logits", {"precision": "float32"})
    run = Run(seed=4, training=TrainingSource(str(tmp_path / "text.txt")))
    found = step_circumstances(method, Artifact.open(model), run)
    assert (found["seed"], found["precision"]) == (4, "float32")
    assert len(found["train"]) == 64
