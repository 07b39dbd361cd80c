"""Metrics are found by their files, and every task names metrics that exist."""

import subprocess
import sys
from pathlib import Path

import pytest

from compress.bench import metrics
from compress.bench.metrics import metrics_of, suites_of
from compress.core.bench import Bench
from compress.core.errors import UsageError
from compress.data.builtin.problems import KINDS
from compress.data.suites import read_suite
from compress.models.tasks import TASKS
from tests.scored_suites import score


@pytest.mark.parametrize("name", metrics.names())
def test_every_metric_keeps_its_contract(name: str) -> None:
    metric = metrics.find(name)
    assert metric.title
    assert metric.quantities
    assert all(value.value is None and value.reason == "why" for value in metric.missing("why").values())


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task_names_metrics_that_exist(task: str) -> None:
    assert set(TASKS[task].metrics) <= set(metrics.names())
    assert len(metrics.quantities(TASKS[task].metrics)) >= 10


def test_gates_options_and_results_need_no_torch() -> None:
    program = (
        "import sys, compress.core.gate, compress.core.bench, compress.bench.results, compress.runtimes, "
        "compress.models.tasks, compress.bench.report.terminal\n"
        "raise SystemExit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_names_of_results_are_described_by_their_templates() -> None:
    names = ["decode.8x512.tokens_per_second", "decode.tokens_per_second", "suite.piqa.accuracy"]
    found = metrics.described(names, ["decode", "suite"])
    assert {name: quantity.title for name, quantity in found.items()} == {
        "decode.tokens_per_second": "decode",
        "decode.8x512.tokens_per_second": "8x512, decode",
        "suite.piqa.accuracy": "piqa, accuracy",
    }


def test_the_built_in_suites_are_scored_one_by_one() -> None:
    options = Bench.of({"suites": ["builtin:tasks"], "suite_limit": 2})
    assert suites_of(options) == tuple(f"builtin:tasks/{name}" for name in KINDS)
    metrics = metrics_of(TASKS["text-generation"], options)
    assert metrics[-len(KINDS) :] == tuple(f"suite:builtin:tasks/{name}" for name in KINDS)


def test_an_unknown_built_in_suite_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'sums'"):
        suites_of(Bench(suites=("builtin:tasks/sum",)))
    with pytest.raises(UsageError, match="both called 'sums'"):
        metrics_of(TASKS["text-generation"], Bench(suites=("builtin:tasks", "builtin:tasks/sums")))


def test_a_built_in_suite_is_scored_as_one_of_a_file_is(before: Path) -> None:
    found = score(before, Path("builtin:tasks/where"), suite_limit=3)
    protocol = found["accuracy"].conditions["protocol"]
    assert len(found["accuracy"].samples) == protocol["examples"] == 3
    assert protocol["suite"] == read_suite("builtin:tasks/where", limit=3).digest
