"""Looks of an experiment at its gates: further ones while a gate is undecided, and what each may err."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.bench.experiment import compare
from compress.bench.isolate import Reply
from compress.bench.judging import judge_again
from compress.core.bench import Bench
from compress.core.gate import Gate
from compress.core.measurement import Measurement
from tests.bench.fabricated import NOT_SLOWER, SMALL, fabricated, one_by_one, steady


def test_an_undecided_gate_is_looked_at_again_with_twice_the_launches(
    before: Path, after: Path, text: Path, tmp_path: Path
) -> None:
    options = {**SMALL, "launches": 3, "budget": 600, "looks": 4}
    found = compare(
        before, [after], tmp_path, str(text), gates=[NOT_SLOWER], options=options, runner=fabricated(steady)
    )
    assert found.looks > 1
    launches = found.arm("after@torch-eager").measurements["decode.tokens_per_second"].launches
    assert len(launches) == 3 * 2 ** (found.looks - 1)
    assert found.verdict == "PASS" or found.looks == 4


def test_a_budget_of_nothing_looks_once(before: Path, after: Path, text: Path, tmp_path: Path) -> None:
    found = compare(
        before, [after], tmp_path, str(text), gates=[NOT_SLOWER], options=SMALL, runner=fabricated(steady)
    )
    assert (found.looks, found.verdict) == (1, "UNDECIDED")
    assert found.exit_code == 11


def test_an_undecided_perplexity_takes_more_text(
    before: Path, after: Path, text: Path, tmp_path: Path
) -> None:
    gate = {"metric": "perplexity", "test": "non-inferiority", "margin": "10%"}
    options = {**SMALL, "window": 16, "tokens": 64, "budget": 600, "launches": 1}
    found = compare(
        before, [after], tmp_path, str(text), gates=[gate], options=options, runner=fabricated(steady)
    )
    assert found.looks > 1
    assert found.options["tokens"] == 64 * 2 ** (found.looks - 1)
    assert len(found.arm("after@torch-eager").measurements["perplexity"].samples) > 4


def test_only_what_is_undecided_is_measured_on_more(
    before: Path, after: Path, text: Path, tmp_path: Path
) -> None:
    suite = tmp_path / "suite.jsonl"
    suite.write_text("".join('{"context": "a", "continuation": "b"}\n' for _ in range(64)))

    def answered(request: Mapping[str, Any], *, stage: str, **_: Any) -> Reply:
        if stage != "scoring":
            return Reply({"measurements": {}, "facts": {}})
        count = Bench.of(request["options"]).suite_limit or 0
        right = [1.0, 1.0, 0.0, 1.0] * (count // 4)
        if "int4" in request["artifact"]:
            right = [1.0, 0.0, 1.0, 1.0] * (count // 4)
        accuracy = Measurement.sampled(right, summary="mean", better="higher")
        return Reply(
            {"measurements": {"suite.suite.accuracy": accuracy.model_dump(mode="json")}, "facts": {}}
        )

    options = {**SMALL, "launches": 1, "budget": 600, "suites": (str(suite),), "suite_limit": 8}
    gate = {"metric": "suite.suite.accuracy", "test": "non-inferiority", "margin": 0.1}
    found = compare(
        before, [after], tmp_path, str(text), gates=[gate], options=options, runner=one_by_one(answered)
    )
    assert found.looks == 4
    assert found.options["suite_limit"] == 8 * 2**3
    assert found.options["tokens"] == Bench.of(SMALL).tokens


def test_further_looks_time_the_arms_and_rates_that_are_undecided(
    before: Path, after: Path, text: Path, tmp_path: Path
) -> None:
    rates = fabricated(steady)
    timed: dict[int, set[tuple[str, str]]] = {}

    def watched(requests: Sequence[Mapping[str, Any]], **circumstances: Any) -> list[Reply]:
        replies = rates(requests, **circumstances)
        stage, _, launch = circumstances["stage"].partition(" ")
        for request, reply in zip(requests, replies, strict=True):
            if stage != "timing":
                continue
            name = f"{Path(request['artifact']).name}@{request['runtime']}"
            timed.setdefault(int(launch), set()).update((name, metric) for metric in request["metrics"])
            # As if the rate of the prompt were without any noise.
            if "prefill" in request["metrics"]:
                rate = Measurement.sampled(
                    [100.0] * 3, summary="geometric-mean", unit="token/s", better="higher"
                )
                reply.document["measurements"]["prefill.tokens_per_second"] = rate.model_dump(mode="json")
        return replies

    easy = {**NOT_SLOWER, "metric": "prefill.tokens_per_second"}
    hard = {**NOT_SLOWER, "margin": "5%", "arms": {"after": "after@torch-eager"}}
    options = {**SMALL, "launches": 3, "budget": 600, "looks": 2, "noise_floor": True}
    options["runtimes"] = ("torch-eager", "torch-int4")
    found = compare(before, [after], tmp_path, str(text), gates=[easy, hard], options=options, runner=watched)
    names = [f"{folder.name}@{runtime}" for folder in (before, after) for runtime in options["runtimes"]]
    everything = {(name, metric) for name in names for metric in ("load", "prefill", "decode")}
    open_still = {(f"{folder.name}@torch-eager", "decode") for folder in (before, after)}
    assert timed == {1: everything, 2: everything, 3: everything, 4: open_still, 5: open_still, 6: open_still}
    # All that was timed more often is compared, by the rounds that both arms of a pair have.
    arms = {arm.name: arm.measurements for arm in found.arms}
    assert len(arms["after@torch-eager"]["decode.tokens_per_second"].launches) == 6
    assert len(arms["after@torch-eager"]["prefill.tokens_per_second"].launches) == 3
    assert len(arms["after@torch-int4"]["decode.tokens_per_second"].launches) == 3
    int4 = next(
        one
        for one in found.comparisons
        if (one.metric, one.after) == ("decode.tokens_per_second", "after@torch-int4")
    )
    assert int4.ratio is not None
    assert "3 launches" in int4.ratio.method
    assert [one.verdict for one in found.judgements if one.metric.startswith("prefill")] == ["PASS"]


def test_the_last_look_judges_with_what_is_left_of_the_error(
    before: Path, after: Path, text: Path, tmp_path: Path
) -> None:
    options = {**SMALL, "launches": 3, "budget": 600, "looks": 2}
    # The rates of `steady` lie at this edge.
    close = {**NOT_SLOWER, "margin": "5%"}
    found = compare(
        before, [after], tmp_path, str(text), gates=[close], options=options, runner=fabricated(steady)
    )
    # Two looks: the first had half of the error, and the second the other half.
    assert (found.looks, found.last_look) == (2, True)
    assert "each bound at 97.5%" in found.judgements[0].explanation
    again = judge_again(found, [Gate.of(close)])
    assert again.judgements == found.judgements


def test_a_first_look_without_room_for_another_has_the_whole_error(
    before: Path, after: Path, text: Path, tmp_path: Path
) -> None:
    options = {**SMALL, "launches": 3, "budget": 1e-6, "looks": 4}
    # The rates of `steady` lie at this edge.
    close = {**NOT_SLOWER, "margin": "5%"}
    found = compare(
        before, [after], tmp_path, str(text), gates=[close], options=options, runner=fabricated(steady)
    )
    assert (found.looks, found.last_look) == (1, True)
    assert "each bound at 95%" in found.judgements[0].explanation


def test_a_look_that_decides_has_its_share_alone(
    before: Path, after: Path, text: Path, tmp_path: Path
) -> None:
    options = {**SMALL, "launches": 3, "budget": 600, "looks": 4}
    easy = {"metric": "decode.tokens_per_second", "test": "non-inferiority", "margin": "90%"}
    found = compare(
        before, [after], tmp_path, str(text), gates=[easy], options=options, runner=fabricated(steady)
    )
    assert (found.looks, found.last_look, found.verdict) == (1, False, "PASS")
    assert "each bound at 98.75%" in found.judgements[0].explanation
