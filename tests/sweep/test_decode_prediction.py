"""Bytes that are read for a token, against those that a session of the bench counts."""

from pathlib import Path

import pytest

from compress.core.artifact import Artifact
from compress.models.load import skeleton
from compress.runtimes._session import read_bytes as counted
from compress.sweep.decode_prediction import decode_prediction, read_bytes
from tests import models_zoo


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mixtral", "opt"])
def test_it_counts_what_the_bench_counts(name: str, tmp_path: Path) -> None:
    model = skeleton(Artifact.open(models_zoo.write(name, tmp_path)))
    shapes = {own: tuple(parameter.shape) for own, parameter in model.named_parameters()}
    real = models_zoo.build(name)
    expected = counted(real.modules())
    assert read_bytes(model, shapes, 4) == pytest.approx(expected, rel=0.02)


def test_speed_is_the_ratio_of_bytes() -> None:
    said = decode_prediction(300, 200)
    assert said == {"read_bytes": {"before": 300, "after": 200}, "predicted_speed": 1.5}
