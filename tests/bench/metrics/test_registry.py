"""Metrics are found by their files, and every task names metrics that exist."""

import subprocess
import sys

import pytest

from compress.bench import metrics
from compress.models.tasks import TASKS


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
        "import sys, compress.core.gate, compress.bench.options, compress.bench.results, compress.runtimes, "
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
