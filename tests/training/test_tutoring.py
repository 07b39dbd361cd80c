"""What is drawn for which kind of model; the training itself is tested with its methods."""

import json
from pathlib import Path
from typing import Any

import pytest

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.passes import build
from compress.core.run import Run, TrainingSource
from compress.models.tasks import FeatureExtraction, TextClassification, TextGeneration
from compress.training.tutoring import drawn, padding_of
from tests import models_zoo, quantized_models
from tests.distill.test_classes import classifier, text


def numbers() -> Any:
    return build("distill.hidden", {"tokens": 160, "window": 16, "batch": 2, "evaluation_tokens": 32})


def test_each_kind_of_model_reads_in_its_way(tmp_path: Path) -> None:
    source = Artifact.open(classifier(tmp_path, "model", layers=1, seed=1))
    run = Run(training=TrainingSource(str(text(tmp_path / "a.jsonl", 40, labelled=40))))
    windows = drawn(numbers(), source, run, TextGeneration(), models_zoo.VOCABULARY)
    assert windows.windows.shape == (10, 16)
    labelled = drawn(numbers(), source, run, TextClassification(), models_zoo.VOCABULARY)
    assert set(labelled.windows[:, 0].tolist()) == {0, 1}
    plain = drawn(numbers(), source, run, FeatureExtraction(), models_zoo.VOCABULARY)
    assert set(plain.windows[:, 0].tolist()) == {-1}
    with pytest.raises(PlanError, match="needs training text"):
        drawn(numbers(), source, Run(), FeatureExtraction(), models_zoo.VOCABULARY)


def test_padding_must_be_named(tmp_path: Path) -> None:
    folder = quantized_models.add_tokenizer(models_zoo.write("llama", tmp_path), models_zoo.VOCABULARY)
    assert padding_of(Artifact.open(folder), Run()) == 0
    config = json.loads((folder / "config.json").read_text())
    config["pad_token_id"] = None
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match="no token for padding"):
        padding_of(Artifact.open(folder), Run())
