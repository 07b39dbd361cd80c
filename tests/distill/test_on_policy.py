"""On-policy distillation through the engine: what it refuses, what comes out, what a crash costs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compress import engine
from compress.core.artifact import Lineage
from compress.core.errors import PlanError, UsageError
from compress.core.recipe import Recipe
from tests import models_zoo
from tests.dummies import Killed, KillingRecorder
from tests.single_steps import bytes_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("on-policy")
    models_zoo.write("llama-tied", folder / "teacher", seed=1)
    models_zoo.write("llama-tied", folder / "student", seed=2)
    save_file({"input_ids": models_zoo.tokens(24, 16)}, folder / "tokens.safetensors")
    return folder


def recipe(place: Path, **options: Any) -> Recipe:
    numbers = {
        "tokens": 640,
        "window": 16,
        "batch": 4,
        "accumulation": 2,
        "prompt_tokens": 4,
        "max_new_tokens": 8,
        "evaluate_every": 2,
        "checkpoint_every": 1,
        "learning_rate": 3e-3,
        "precision": "float32",
    }
    step = {
        "use": "distill.on_policy",
        "teacher": str(place / "teacher" / "llama-tied"),
        **numbers,
        **options,
    }
    return Recipe.of(
        {
            "model": str(place / "student" / "llama-tied"),
            "threads": 1,
            "device": "cpu",
            "data": {"train": str(place / "tokens.safetensors")},
            "steps": [step],
        }
    )


def test_a_student_comes_nearer_to_its_teacher(place: Path, tmp_path: Path) -> None:
    engine.run(recipe(place, tokens=5_120, share=1.0), tmp_path / "out", single=True)
    lineage = Lineage.read(tmp_path / "out")
    assert lineage is not None
    found = lineage.steps[0].decisions["validation"]
    assert found["best"]["jensen_shannon"] < 0.9 * found["before"]["jensen_shannon"]
    assert found["best"]["loss"] == found["best"]["jensen_shannon"]


@pytest.mark.parametrize(
    "moment",
    [
        ("training.step", 3),
        pytest.param(("checkpoint.finish", 2), marks=pytest.mark.slow),
        pytest.param(("training.step", 5), marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bytes(moment: tuple[str, int], place: Path, tmp_path: Path) -> None:
    engine.run(recipe(place), tmp_path / "whole", single=True)
    with pytest.raises(Killed):
        engine.run(recipe(place), tmp_path / "out", single=True, reporter=KillingRecorder(*moment))
    torch.manual_seed(99)
    engine.run(recipe(place), tmp_path / "out", single=True)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_share_zero_is_plain_distillation(place: Path, tmp_path: Path) -> None:
    engine.run(recipe(place, share=0.0), tmp_path / "out", single=True)
    plain = {
        "use": "distill.logits",
        "loss": "jensen_shannon",
        "teacher": str(place / "teacher" / "llama-tied"),
    }
    made = recipe(place, share=0.0)
    kept = ("tokens", "window", "batch", "accumulation", "evaluate_every", "learning_rate", "precision")
    options = {name: made.steps[0].options[name] for name in kept}
    other = made.model_copy(
        update={"steps": Recipe.of({"model": "m", "steps": [{**plain, **options}]}).steps}
    )
    engine.run(other, tmp_path / "logits", single=True)
    for name in ("model.safetensors", "compress.training.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "logits" / name).read_bytes()


def test_sequences_longer_than_a_window_are_refused(place: Path) -> None:
    with pytest.raises(UsageError, match="prompt_tokens 4 and max_new_tokens 20 make 24 tokens"):
        recipe(place, max_new_tokens=20)


def test_a_model_cannot_teach_itself(place: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="the same model"):
        engine.plan(recipe(place, teacher="$model"), tmp_path / "out", single=True)
