from typing import Any

import pytest

from compress.core.errors import PlanError, UsageError
from compress.core.passes import build
from compress.training.trainer import Trainer


def numbers(**options: Any) -> Trainer:
    built = build("distill.logits", options)
    assert isinstance(built, Trainer)
    return built


def test_a_budget_buys_whole_steps() -> None:
    found = numbers(tokens="1_000", window=16, batch=4, accumulation=2)
    assert (found.step_tokens, found.steps) == (128, 7)
    assert found.evaluation_interval == 1
    assert numbers(tokens=12_800, window=16).evaluation_interval == 10
    assert numbers(evaluate_every=3).evaluation_interval == 3


def test_a_budget_that_buys_no_step_is_refused() -> None:
    with pytest.raises(PlanError, match=r"100 tokens does not pay for one step of 4,096"):
        _ = numbers(tokens=100).steps


@pytest.mark.parametrize(
    ("given", "steps", "seconds"), [(5, 5, None), ("5", 5, None), ("90s", None, 90.0), ("300s", None, 300.0)]
)
def test_checkpoints_are_parted_by_steps_or_seconds(
    given: object, steps: int | None, seconds: float | None
) -> None:
    found = numbers(checkpoint_every=given)
    assert (found.checkpoint_steps, found.checkpoint_seconds) == (steps, seconds)


@pytest.mark.parametrize("given", [0, "0", "0s", "5m", "-1", "soon"])
def test_other_spans_are_refused(given: object) -> None:
    with pytest.raises(UsageError, match="checkpoint_every"):
        numbers(checkpoint_every=given)


def test_an_evaluation_reads_at_least_one_window() -> None:
    assert numbers(window=512, evaluation_tokens=100).evaluation_windows == 1
    assert numbers(window=512, evaluation_tokens=2_000).evaluation_windows == 3
