"""Answers that changed, by counting."""

from pathlib import Path

import pytest

from compress.bench.flips import flips, flips_of
from compress.bench.results import ArmResult
from compress.core.measurement import Measurement
from compress.data.suites import read_suite
from tests.scored_suites import write

GOLD = [0, 1, 2, 0, 1, 2]
BEFORE = [0, 1, 0, 1, 0, 2]
AFTER = [0, 0, 1, 0, 0, 2]


def measured(answers: list[int], digest: str = "x") -> Measurement:
    return Measurement.sampled(
        [float(a == g) for a, g in zip(answers, GOLD, strict=True)],
        summary="mean",
        answers=[str(a) for a in answers],
        conditions={"protocol": {"suite": digest}},
    )


def arm(name: str, answers: list[int], digest: str) -> ArmResult:
    return ArmResult(
        name=f"{name}@torch-eager",
        model=name,
        role="before" if name == "before" else "after",
        runtime="torch-eager",
        path=name,
        digest=name,
        measurements={"suite.quiz.accuracy": measured(answers, digest), "size.bytes": Measurement.exact(1)},
    )


def test_flips_are_counted_by_kind() -> None:
    found = flips(measured(BEFORE), measured(AFTER))
    assert (found.right_to_wrong, found.wrong_to_right, found.wrong_to_other_wrong) == (1, 1, 1)
    assert found.examples == 6
    assert [(flip.example, flip.kind, flip.before, flip.after) for flip in found.shown] == [
        (1, "right-to-wrong", "1", "0"),
        (3, "wrong-to-right", "1", "0"),
        (2, "wrong-to-other-wrong", "0", "1"),
    ]
    assert flips(measured(BEFORE), measured(BEFORE)).shown == ()
    assert len(flips(measured(GOLD), measured([1, 0, 0, 1, 0, 0]), most=2).shown) == 2


def test_only_the_same_examples_are_compared() -> None:
    with pytest.raises(ValueError, match="same examples"):
        flips(measured(BEFORE), measured(AFTER, "y"))
    with pytest.raises(ValueError, match="no answers"):
        flips(Measurement.exact(1), measured(AFTER))


def test_flips_say_what_was_asked(tmp_path: Path) -> None:
    lines = [
        {"query": f"Q{n}" * 400, "choices": ["red", "green", "blue"], "gold": g} for n, g in enumerate(GOLD)
    ]
    suite = read_suite(write(tmp_path / "quiz.jsonl", lines))
    before, after = arm("before", BEFORE, suite.digest), arm("after", AFTER, suite.digest)
    (found,) = flips_of(before, after, [suite])
    assert (found.metric, found.before, found.after) == (
        "suite.quiz.accuracy",
        "before@torch-eager",
        "after@torch-eager",
    )
    first = found.shown[0]
    assert (first.before, first.after, first.gold) == ("green", "red", "green")
    assert first.question.startswith("Q1")
    assert len(first.question) == 300
    assert flips_of(before, arm("after", AFTER, "other"), [suite]) == []
    (untold,) = flips_of(before, after)
    assert untold.shown[0].question == ""
