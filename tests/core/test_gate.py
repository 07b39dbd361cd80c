"""Gates judge intervals: wholly acceptable, wholly not, or not to be told."""

from pathlib import Path
from typing import Any

import pytest

from compress.core.errors import UsageError
from compress.core.gate import Gate, Verdict, check_metrics, worst
from compress.core.measurement import Effect, EffectKind


def effect(kind: EffectKind, low: float | None, high: float | None, point: float | None = None) -> Effect:
    middle = point if point is not None else ((low or 0) + (high or 0)) / 2
    return Effect(kind=kind, point=middle, low=low, high=high, confidence=0.95, method="test")


BOUND = {"metric": "size.bytes", "test": "bound", "at_most": "50%"}
NOT_WORSE = {"metric": "perplexity", "test": "non-inferiority", "margin": "10%"}
BETTER = {"metric": "decode.tokens_per_second", "test": "superiority"}


@pytest.mark.parametrize(
    ("document", "better", "low", "high", "verdict"),
    [
        (BOUND, "lower", 0.4, 0.5, "PASS"),
        (BOUND, "lower", 0.4, 0.6, "UNDECIDED"),
        (BOUND, "lower", 0.51, 0.6, "FAIL"),
        (NOT_WORSE, "lower", 0.9, 1.09, "PASS"),
        (NOT_WORSE, "lower", 1.05, 1.11, "UNDECIDED"),
        (NOT_WORSE, "lower", 1.11, 1.2, "FAIL"),
        (NOT_WORSE, "higher", 0.91, 0.95, "PASS"),
        (NOT_WORSE, "higher", 0.8, 0.89, "FAIL"),
        (BETTER, "higher", 1.01, 1.2, "PASS"),
        (BETTER, "higher", 1.0, 1.2, "UNDECIDED"),
        (BETTER, "higher", 0.9, 1.0, "FAIL"),
        (BETTER, "lower", 0.8, 0.99, "PASS"),
        ({**BETTER, "margin": "5%"}, "higher", 1.01, 1.04, "FAIL"),
        ({**BETTER, "margin": "5%"}, "lower", 0.90, 0.94, "PASS"),
    ],
)
def test_verdicts_on_ratios(
    document: dict[str, Any], better: Any, low: float, high: float, verdict: str
) -> None:
    gate = Gate.of(document)
    assert gate.wants == "ratio"
    assert gate.judge(effect("ratio", low, high), better).verdict == verdict


def test_plain_numbers_are_in_the_unit_of_the_metric() -> None:
    bound = Gate.of({"metric": "fidelity.kl", "test": "bound", "at_most": 0.05})
    assert bound.wants == "value"
    assert bound.judge(effect("value", 0.01, 0.04), "lower").verdict == "PASS"
    least = Gate.of({"metric": "accuracy", "test": "bound", "at_least": 0.9})
    assert least.judge(effect("value", 0.8, 0.89), "higher").verdict == "FAIL"
    margin = Gate.of({"metric": "accuracy", "test": "non-inferiority", "margin": 0.01})
    assert margin.wants == "difference"
    assert margin.judge(effect("difference", -0.005, 0.02), "higher").verdict == "PASS"
    assert margin.judge(effect("difference", -0.03, -0.02), "higher").verdict == "FAIL"


def test_without_an_interval_nothing_is_decided() -> None:
    judgement = Gate.of(NOT_WORSE).judge(effect("ratio", None, None, 1.0), "lower")
    assert judgement.verdict == "UNDECIDED"
    assert "without an interval" in judgement.explanation


def test_a_metric_without_direction_takes_bounds_alone() -> None:
    assert Gate.of(NOT_WORSE).judge(effect("ratio", 1.0, 1.0), "neither").verdict == "INVALID"
    assert Gate.of(BOUND).judge(effect("ratio", 0.3, 0.3), "neither").verdict == "PASS"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({**BOUND, "at_least": 3}, "exactly one"),
        ({"metric": "x", "test": "bound"}, "exactly one"),
        ({"metric": "x", "test": "non-inferiority"}, "needs a margin"),
        ({**NOT_WORSE, "margin": "-1%"}, "not negative"),
        ({**NOT_WORSE, "margin": "ten"}, "a number or a percentage"),
        ({**NOT_WORSE, "margin": True}, "a number or a percentage"),
        ({**NOT_WORSE, "confidence": 95}, "confidence"),
        ({**NOT_WORSE, "margn": 1}, "did you mean 'margin'"),
        ({**NOT_WORSE, "test": "inferiority"}, "test"),
    ],
)
def test_a_gate_that_makes_no_sense_is_refused(document: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Gate.of(document)


def test_an_unknown_metric_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(UsageError, match="did you mean 'perplexity'"):
        check_metrics([Gate.of({**NOT_WORSE, "metric": "perplexitty"})], ["perplexity", "size.bytes"])


def test_it_is_written_as_it_was_read() -> None:
    gate = Gate.of({**BOUND, "arms": {"after": "after@torch-int4"}})
    document = gate.model_dump(mode="json")
    assert document["at_most"] == "50%"
    assert Gate.of({key: value for key, value in document.items() if value is not None}) == gate
    assert str(gate) == "size.bytes at most 50% of BEFORE"


def test_exit_codes() -> None:
    assert [verdict.exit_code for verdict in Verdict] == [0, 10, 11, 12]
    assert worst([]) is Verdict.PASS
    assert worst([Verdict.PASS, Verdict.UNDECIDED]) is Verdict.UNDECIDED
    assert worst([Verdict.INVALID, Verdict.UNDECIDED]) is Verdict.INVALID
    assert worst([Verdict.INVALID, Verdict.FAIL]) is Verdict.FAIL


RANGE = {"metric": "sparsity", "test": "range", "at_least": 0.4, "at_most": 0.6}


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.45, 0.55, "PASS"),
        (0.4, 0.6, "PASS"),
        (0.35, 0.55, "UNDECIDED"),
        (0.3, 0.7, "UNDECIDED"),
        (0.61, 0.7, "FAIL"),
        (0.1, 0.39, "FAIL"),
    ],
)
def test_a_range_has_two_ends(low: float, high: float, verdict: str) -> None:
    gate = Gate.of(RANGE)
    assert gate.wants == "value"
    assert gate.judge(effect("value", low, high), "neither").verdict == verdict


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"at_most": None}, "both at_least and at_most"),
        ({"margin": "1%"}, "no margin"),
        ({"at_least": "40%"}, "both shares"),
        ({"at_least": 0.7}, "is empty"),
    ],
)
def test_a_range_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Gate.of({**RANGE, **change})


@pytest.mark.parametrize("text", ["- {gate}\n", "gates:\n  - {gate}\n"])
def test_gates_are_read_from_a_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "gates.yaml"
    file.write_text(text.replace("{gate}", "{metric: perplexity, test: bound, at_most: 20}"))
    assert [str(gate) for gate in Gate.load(file)] == ["perplexity at most 20"]


@pytest.mark.parametrize(
    ("text", "message"), [("steps: []", "holds no gates"), ("- 3", "no mapping"), ("{", "not YAML")]
)
def test_a_file_without_gates_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "gates.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        Gate.load(file)


def test_a_recovery_names_who_lost_and_how_much_shall_come_back() -> None:
    asked = {"metric": "perplexity", "test": "recovery", "at_least": "50%", "arms": {"damaged": "pruned"}}
    gate = Gate.of(asked)
    assert gate.wants == "recovery"
    assert str(gate) == "perplexity regained by at least 50% of what pruned lost"
    for low, high, verdict in ((0.6, 0.8, "PASS"), (0.1, 0.4, "FAIL"), (0.4, 0.7, "UNDECIDED")):
        found = Effect(
            kind="recovery", point=(low + high) / 2, low=low, high=high, confidence=0.95, method="bootstrap"
        )
        judgement = gate.judge(found, "lower")
        assert judgement.verdict == verdict
        assert f"{low:.1%}, {high:.1%}] of the loss is regained" in judgement.explanation
    for changed in (
        {"arms": {}},
        {"at_least": 0.5},
        {"margin": "1%"},
        {"test": "bound"},
    ):
        with pytest.raises(UsageError):
            Gate.of({**asked, **changed})
