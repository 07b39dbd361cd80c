"""What the command line cannot say and a caller can: the rest is in tests/distill/test_logits.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.passes import build
from compress.core.run import Run, TrainingSource
from compress.training.teacher import same_vocabulary, teacher_of
from tests import models_zoo, quantized_models

TEXT = TrainingSource("text.txt")


def asked(**options: Any) -> Any:
    return build("distill.logits", {"window": 16, **options})


@pytest.fixture
def student(tmp_path: Path) -> Artifact:
    return Artifact.open(models_zoo.write("llama", tmp_path / "student"))


def test_text_and_teacher_must_be_at_hand(student: Artifact) -> None:
    with pytest.raises(PlanError, match=r"distill\.logits needs training text"):
        teacher_of(asked(), "teacher", student, Run())
    with pytest.raises(PlanError, match=r"the teacher of distill\.logits is not at hand"):
        teacher_of(asked(), "teacher", student, Run(training=TEXT))
    run = Run(training=TEXT, models={"teacher": student.path})
    assert teacher_of(asked(), "teacher", student, run) == student


def test_formats_that_cannot_be_run_are_refused(student: Artifact, tmp_path: Path) -> None:
    folder = models_zoo.write("llama", tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}})
    )
    with pytest.raises(PlanError, match="'bitsandbytes' model"):
        teacher_of(asked(), "teacher", student, Run(training=TEXT, models={"teacher": folder}))
    graph = tmp_path / "graph"
    graph.mkdir()
    (graph / "model.onnx").write_bytes(b"")
    with pytest.raises(PlanError, match="no transformers model"):
        teacher_of(asked(), "teacher", student, Run(training=TEXT, models={"teacher": graph}))


def test_a_model_without_words_is_compared_by_numbers(student: Artifact, tmp_path: Path) -> None:
    teacher = models_zoo.write("llama", tmp_path / "teacher")
    quantized_models.add_tokenizer(teacher, models_zoo.VOCABULARY)
    same_vocabulary(student, Artifact.open(teacher), (96, 96), Run())
    with pytest.raises(PlanError, match=r"has 96 tokens, teacher .* has 128"):
        same_vocabulary(student, Artifact.open(teacher), (96, 128), Run())
