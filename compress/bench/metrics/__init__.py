"""What a bench measures, one metric a file: ``metrics/decode.py`` gives ``decode.tokens_per_second``.

A metric says which quantities it gives, in which unit, which direction is an improvement, and at which
stage of an experiment it is taken. Nothing here imports torch.
"""

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from compress.bench.clock import Clock, WallClock
from compress.bench.nvml import Tenants
from compress.core.artifact import Artifact
from compress.core.bench import Bench
from compress.core.errors import PlanError, UsageError
from compress.core.measurement import Direction, Measurement, Summary
from compress.data.suites import Suite, expand, read_suite, suite_name

if TYPE_CHECKING:
    from compress.bench.bandwidth import Probe
    from compress.bench.log_probabilities import LogProbabilities, Recorder
    from compress.bench.material import Material
    from compress.models.tasks import Task
    from compress.runtimes import Session

HARNESS: Final = "lm-eval:"
"""Before the name or the file of a task of lm-evaluation-harness, among the suites."""


class Stage(StrEnum):
    """When a metric is taken."""

    PREPARING = "preparing"  # nothing is: a model is brought into the form that a runtime loads
    FILES = "files"  # from the files alone, without running the model
    TIMING = "timing"  # in every timed launch, interleaved with the other arms
    MEMORY = "memory"  # in a pass of its own, so that nothing else has touched the memory
    SCORING = "scoring"  # once over the text


@dataclass(frozen=True)
class Quantity:
    """One number that a metric gives.

    Attributes:
        name: as gates spell it.
        title: for a table.
        unit: of the value.
        better: which change is an improvement.
        shown: whether the short table has a row for it.
    """

    name: str
    title: str
    unit: str
    better: Direction
    shown: bool = True

    def of(self, source: str) -> "Quantity":
        """The quantity of one source, where the name of this one holds a ``*``."""
        return replace(self, name=self.name.replace("*", source), title=f"{source}, {self.title}")

    def exact(self, value: float, conditions: Mapping[str, Any] | None = None) -> Measurement:
        """A value without sampling error."""
        return Measurement.exact(value, self.unit, self.better, conditions)

    def missing(self, reason: str) -> Measurement:
        """``n/a`` with a reason."""
        return Measurement.missing(reason, unit=self.unit, better=self.better)

    def sampled(
        self,
        samples: Sequence[float],
        summary: Summary,
        *,
        weights: Sequence[float] | None = None,
        clusters: Sequence[int] | None = None,
        answers: Sequence[str] | None = None,
        conditions: Mapping[str, Any] | None = None,
        complete: bool = False,
    ) -> Measurement:
        """A value from its samples."""
        return Measurement.sampled(
            samples,
            summary=summary,
            unit=self.unit,
            better=self.better,
            weights=weights,
            clusters=clusters,
            answers=answers,
            conditions=conditions,
            complete=complete,
        )


@dataclass(frozen=True)
class Subject:
    """What is measured, and on what.

    Attributes:
        artifact: the model folder.
        task: what the model does.
        options: of the experiment.
        session: the model in memory; not there at the stage ``files``.
        reference: BEFORE in memory, while an AFTER is scored.
        stored: BEFORE's distributions from a file, in place of BEFORE in memory.
        recorder: takes BEFORE's distributions while it is scored, where they are to be stored.
        material: tokens and labels; not there at the stage ``files``.
        load_seconds: what loading took.
        baseline: memory of the process before the model was loaded, bytes by kind.
        charged: folder of the process's own memory cgroup.
        uncharged: why it has none.
        clock: what times the session's work.
        probe: the memory that weights are read from, to check rates against.
        tenants: who is on the session's GPU; or why that is not known.
        take_turn: called before each timed sample; it returns when no other process of the experiment works.
        observed: what belongs to a launch's record beside the measurements, filled by metrics.
        memo: what one metric computed and another may read, so that a text is run through once.
    """

    artifact: Artifact
    task: "Task"
    options: Bench
    session: "Session | None" = None
    reference: "Session | None" = None
    stored: "LogProbabilities | None" = None
    recorder: "Recorder | None" = None
    material: "Material | None" = None
    load_seconds: float = 0.0
    baseline: Mapping[str, int] | None = None
    charged: str | None = None
    uncharged: str = ""
    clock: Clock = field(default_factory=WallClock)
    probe: "Probe | None" = None
    tenants: "Tenants | str" = "the model does not run on a GPU"
    take_turn: Callable[[], None] = lambda: None
    observed: dict[str, Any] = field(default_factory=dict, compare=False)
    memo: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def running(self) -> "Session":
        """The session.

        Raises:
            ValueError: the metric is taken at a stage where no model runs.
        """
        if self.session is None:
            raise ValueError("no model runs at this stage")
        return self.session

    @property
    def given(self) -> "Material":
        """The material.

        Raises:
            ValueError: the metric is taken at a stage without one.
        """
        if self.material is None:
            raise ValueError("no material is given at this stage")
        return self.material


class Metric(ABC):
    """One kind of measurement. Has no state, but for the source of examples that some take."""

    title: ClassVar[str]
    stage: ClassVar[Stage]
    of_examples: ClassVar[bool] = False
    """Whether it is scored on the examples of a suite, and not on the experiment's text."""
    quantities: tuple[Quantity, ...]
    """Of the class: all that it may give, a ``*`` standing for the name of a source. Of an instance with a
    source: those that this source gives."""

    @abstractmethod
    def measure(self, subject: Subject) -> dict[str, Measurement]:
        """All its quantities by name; one that cannot be measured is ``n/a`` with a reason."""

    def missing(self, reason: str) -> dict[str, Measurement]:
        """All its quantities as ``n/a``."""
        return {quantity.name: quantity.missing(reason) for quantity in self.quantities}


@cache
def names() -> tuple[str, ...]:
    """The stems of all metric files, without importing any."""
    folder = Path(__file__).resolve().parent
    return tuple(file.stem for file in sorted(folder.glob("*.py")) if not file.stem.startswith("_"))


@cache
def find(name: str) -> Metric:
    """The metric in a file: ``perplexity``, or with a source of examples ``suite:lm_tasks/piqa.jsonl.gz``,
    or at a further shape ``decode:8x512``.

    Raises:
        PlanError: the file breaks the contract: one metric, whose quantities carry the file's name.
        DataError: the source cannot be read.
        UsageError: the source is a shape, and spells none.
    """
    stem, _, source = name.partition(":")
    module = importlib.import_module(f"{__name__}.{stem}")
    found: list[Callable[..., Metric]] = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Metric) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise PlanError(f"{module.__name__} must hold exactly one metric, it holds {len(found)}")
    metric = found[0](source) if source else found[0]()
    for quantity in metric.quantities:
        if quantity.name.partition(".")[0] != stem:
            raise PlanError(f"{module.__name__}: quantity '{quantity.name}' must start with '{stem}'")
    return metric


def metrics_of(task: "Task", options: Bench) -> tuple[str, ...]:
    """The metrics of an experiment: the task's, the timed ones for each further shape, one for each suite.

    Raises:
        UsageError: two suites have the same name, what should be a shape is none, or a task of
            lm-evaluation-harness is unknown or cannot be measured.
        DataError: a suite cannot be read.
        EnvironmentFault: a task's package is not installed, or its data cannot be had.
    """
    named: dict[str, tuple[str, str]] = {}
    for source in suites_of(options):
        name, metric = _of_suite(source, options)
        if name in named:
            raise UsageError(
                f"{named[name][0]} and {source} are both called '{name}'", "rename one of the two files"
            )
        named[name] = (source, metric)
    shaped = [
        f"{name}:{shape}"
        for shape in dict.fromkeys(options.shapes)
        for name in task.metrics
        if find(name).stage is Stage.TIMING and any("*" in each.name for each in type(find(name)).quantities)
    ]
    for name in shaped:
        find(name)
    return (*task.metrics, *shaped, *(metric for _, metric in named.values()))


def suites_of(options: Bench) -> tuple[str, ...]:
    """The suites that are scored, one by one where a name stands for several.

    Raises:
        UsageError: there is no such built-in suite.
    """
    return expand(options.suites)


def _of_suite(source: str, options: Bench) -> tuple[str, str]:
    """How a suite is called, and the metric that it is scored by; all of it is read, so that it is there."""
    if not source.startswith(HARNESS):
        read_suite(source, limit=options.suite_limit)
        return suite_name(source), f"suite:{source}"
    # Only here, because a harness that nobody asks for need not be installed.
    from compress.bench.metrics._harness_tasks import find_task, load

    file = find_task(source, trusted=options.trust_remote_code)
    return HARNESS + load(file).name, f"lm_eval:{file}"


def examples_of(source: str, options: Bench) -> Suite:
    """What a suite asks, for a report.

    Raises:
        DataError, EnvironmentFault, UsageError: as `metrics_of`.
    """
    if not source.startswith(HARNESS):
        return read_suite(source, limit=options.suite_limit)
    from compress.bench.metrics._harness_tasks import find_task, load

    return load(find_task(source, trusted=options.trust_remote_code)).examples(options.suite_limit)


def quantities(metrics: Iterable[str]) -> dict[str, Quantity]:
    """All quantities of some metrics, by name, in the order of a report."""
    return {quantity.name: quantity for name in metrics for quantity in find(name).quantities}


def described(measured: Iterable[str], metrics: Iterable[str]) -> dict[str, Quantity]:
    """The quantities that have these names, in the order of `metrics`; for readers of stored results.

    Args:
        measured: names of quantities, such as ``suite.piqa.accuracy``.
        metrics: stems of metrics. Their sources need not be there any more.
    """
    asked = list(dict.fromkeys(measured))
    found = {}
    for quantity in (each for name in metrics for each in type(find(name)).quantities):
        head, star, tail = quantity.name.partition("*")
        for name in asked:
            if not star and name == quantity.name:
                found[name] = quantity
            # The source lies between the two, and neither of them in the other.
            elif star and len(name) > len(head) + len(tail) and name.startswith(head) and name.endswith(tail):
                found[name] = quantity.of(name[len(head) : len(name) - len(tail)])
    return found
