"""What a search finds is remembered for the configuration, and nothing else is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.run import Run
from compress.models import architecture
from compress.models.architecture import found_in
from tests import models_zoo


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    architecture.forget()
    yield
    architecture.forget()


class Counting:
    """Tells the width of a model, and how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, model: Any) -> tuple[int, torch.dtype]:
        self.asked += 1
        return model.config.hidden_size, model.dtype


def test_the_same_configuration_is_looked_at_once_wherever_it_lies(tmp_path: Path) -> None:
    search = Counting()
    one = Artifact.open(models_zoo.write("llama", tmp_path / "one"))
    other = Artifact.open(models_zoo.write("llama", tmp_path / "other", seed=1))
    assert found_in(search, one, Run()) == found_in(search, other, Run()) == (32, torch.float64)
    assert search.asked == 1
    assert found_in(search, one, Run(), torch.float32) == (32, torch.float32)
    assert found_in(search, one, Run(task="feature-extraction")) == (32, torch.float64)
    narrow = Artifact.open(models_zoo.write("llama", tmp_path / "narrow", hidden_size=16))
    assert found_in(search, narrow, Run())[0] == 16
    assert search.asked == 4


def test_code_of_the_model_itself_is_told_by_its_place(tmp_path: Path) -> None:
    search = Counting()
    for name in ("one", "other", "one"):
        if not (tmp_path / name).exists():
            models_zoo.write("llama", tmp_path / name)
        found_in(search, Artifact.open(tmp_path / name / "llama"), Run(trust_remote_code=True))
    assert search.asked == 2


def test_a_refusal_is_not_remembered_and_the_oldest_answer_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    search, asked = Counting(), []

    def refusing(model: Any) -> None:
        asked.append(model)
        raise PlanError("no")

    for _ in range(2):
        with pytest.raises(PlanError):
            found_in(refusing, source, Run())
    assert len(asked) == 2
    monkeypatch.setattr(architecture, "_REMEMBERED", 2)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float32, torch.float64):
        found_in(search, source, Run(), dtype)
    assert search.asked == 4
