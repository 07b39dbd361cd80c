"""Which projections there are, and that what is arranged is what was asked for."""

from typing import Any

import pytest

from compress.core.run import Run
from compress.data.training import TrainingText
from compress.models.tasks import FeatureExtraction, TextGeneration
from compress.training.arrangement import Asked, Within, arranged
from compress.training.matching import EMBEDDED, VECTOR, Plan
from compress.training.objective import Objective
from tests import models_zoo
from tests.training.test_outputs import encoder, rows


def within(*, widths: tuple[int, int] = (32, 32), always: bool = False, **weights: float) -> Within:
    plan = Plan(weights, ((1, 2), (3, 3)), ((3, 3),), 4, 0, "relative", False)  # type: ignore[arg-type]
    return Within(plan, widths, always)


@pytest.mark.parametrize(
    ("made", "vector", "places"),
    [
        (within(states=1.0, embeddings=1.0), True, []),
        (within(states=1.0, embeddings=1.0, always=True), True, [EMBEDDED, 1, 3, VECTOR]),
        (within(states=1.0, widths=(24, 32)), False, [1, 3]),
        (within(relations=1.0, widths=(24, 32)), False, []),
        (within(widths=(24, 32)), True, [VECTOR]),
    ],
)
def test_there_is_a_projection_for_each_place_that_needs_one(
    made: Within, vector: bool, places: list[int]
) -> None:
    assert list(made.projections(0, vector=vector)) == [str(place) for place in places]


def test_an_encoder_is_arranged_with_its_projections() -> None:
    student, teacher = encoder(1).float(), encoder(2).float().requires_grad_(False)
    lesson = arranged(
        student,
        teacher,
        FeatureExtraction(),
        Asked(weight=0.5),
        within(states=1.0, always=True),
        text=TrainingText(rows(), rows(), "documents"),
        arithmetic="float32",
        run=Run(device="cpu"),
    )
    assert lesson.objective.names == ("loss", "states", "outputs", "cosine")
    lesson.objective.learn(rows(), 3.0)
    assert lesson.beside is not None
    assert all(weight.grad is not None for weight in lesson.beside.parameters())
    assert all(weight.grad is None for weight in teacher.parameters())


def test_a_language_model_without_anything_inside_is_distilled_from_its_distributions() -> None:
    student, teacher = (
        models_zoo.build("llama", seed=1),
        models_zoo.build("llama", seed=2).requires_grad_(False),
    )
    options: dict[str, Any] = {
        "text": TrainingText(models_zoo.tokens(2, 8), models_zoo.tokens(1, 8), "windows"),
        "arithmetic": "float32",
        "run": Run(device="cpu"),
    }
    objective: Objective = arranged(student, teacher, TextGeneration(), Asked(), None, **options).objective
    assert objective.names == ("loss", "divergence", "cross_entropy")
    means = objective.learn(models_zoo.tokens(2, 8), 14.0).means()
    assert means["loss"] == pytest.approx(means["divergence"])
