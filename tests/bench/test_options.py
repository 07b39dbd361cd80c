"""Settings of an experiment that stand for several."""

from pathlib import Path

import pytest

from compress.bench.metrics import metrics_of
from compress.bench.options import Options
from compress.core.errors import UsageError
from compress.data.builtin.problems import KINDS
from compress.data.suites import read_suite
from compress.models.tasks import TASKS
from tests.scored_suites import score


def test_the_built_in_suites_are_scored_one_by_one() -> None:
    options = Options.of({"suites": ["builtin:tasks"], "suite_limit": 2})
    assert options.suites == tuple(f"builtin:tasks/{name}" for name in KINDS)
    assert Options.of(options.model_dump()) == options
    metrics = metrics_of(TASKS["text-generation"], options)
    assert metrics[-len(KINDS) :] == tuple(f"suite:builtin:tasks/{name}" for name in KINDS)


def test_an_unknown_built_in_suite_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'sums'"):
        Options.of({"suites": ["builtin:tasks/sum"]})
    with pytest.raises(UsageError, match="both called 'sums'"):
        metrics_of(TASKS["text-generation"], Options(suites=("builtin:tasks", "builtin:tasks/sums")))


def test_a_built_in_suite_is_scored_as_one_of_a_file_is(before: Path) -> None:
    found = score(before, Path("builtin:tasks/sums"), suite_limit=3)
    protocol = found["accuracy"].conditions["protocol"]
    assert len(found["accuracy"].samples) == protocol["examples"] == 3
    assert protocol["suite"] == read_suite("builtin:tasks/sums", limit=3).digest
