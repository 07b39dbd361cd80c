"""The report: what it says, and that it stays small."""

from typing import Any

from compress.bench.judging import compare_arms
from compress.bench.report.markdown import LARGEST, markdown
from compress.bench.report.rows import number, table
from compress.bench.results import ArmResult, Fault, Results
from compress.core.bench import Bench
from compress.core.measurement import Measurement


def arm(model: str, value: float | None, **others: Any) -> ArmResult:
    perplexity = (
        Measurement.missing("out-of-memory: no more", better="lower")
        if value is None
        else Measurement.sampled(
            [value, value + 0.1],
            summary="exponential-mean",
            better="lower",
            conditions={"protocol": {"window": 9}},
        )
    )
    role: Any = "before" if model == "before" else "after"
    return ArmResult(
        name=f"{model}@torch-eager",
        model=model,
        role=role,
        runtime="torch-eager",
        path=f"/models/{model}",
        digest="d" * 64,
        measurements={"perplexity": perplexity, "size.bytes": Measurement.exact(2**20, "B", "lower")},
        **others,
    )


def results(*arms: ArmResult) -> Results:
    options = Bench()
    return Results(
        complete=True,
        command=("compress", "bench"),
        task="text-generation",
        text={"source": "text"},
        options=options.model_dump(mode="json"),
        environment={"processor": "one"},
        arms=arms,
        comparisons=tuple(compare_arms(arms, options)),
    )


def test_values_changes_protocol_and_faults() -> None:
    fault = Fault(stage="memory", kind="killed", message="ended by SIGKILL")
    text = markdown(results(arm("before", 2.0), arm("after", 2.2, faults=(fault,)), arm("w2", None)))
    assert "9.0250" not in text
    assert "7.7679" in text
    assert "+22.1%" in text
    assert "n/a [1]" in text
    assert "[1] out-of-memory: no more" in text
    assert '{"window": 9}' in text
    assert "memory **killed**: ended by SIGKILL" in text
    assert "1 MiB" in text


def test_layers_that_run_dense_are_named() -> None:
    dense = {f"model.layers.{n}": "groups of 16 inputs" for n in range(12)}
    text = markdown(results(arm("before", 2.0), arm("after", 2.0, facts={"dense_layers": dense})))
    assert "12 quantized layers run dense: model.layers.0 (groups of 16 inputs)" in text
    assert "and 4 more" in text


def test_it_stays_small() -> None:
    faults = tuple(Fault(stage="timing", kind="crashed", message="x" * 2_000) for _ in range(60))
    text = markdown(results(arm("before", 2.0), arm("after", 2.0, faults=faults)))
    assert len(text.encode()) <= LARGEST
    assert "results.json" in text


def test_rows_without_any_value_are_left_out_where_that_is_a_matter_of_course() -> None:
    shown = table(results(arm("before", 2.0), arm("after", 2.2)))
    assert [row[0] for row in shown.rows] == ["weights on disk", "perplexity"]


def test_numbers_for_people() -> None:
    assert number(3_881_752, "B") == "3.702 MiB"
    assert number(512, "B") == "512 B"
    assert number(4_196_608, "") == "4,196,608"
    assert number(61.57375, "") == "61.574"
    assert number(123_456.7, "token/s") == "123,457"
