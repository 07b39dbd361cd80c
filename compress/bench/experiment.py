"""One experiment, before and after: all arms on the same tokens, every measured run in its own process.

Timed launches of all arms make a round: each is a fresh process, and they take turns, sample by sample, in
seeded random order, so that a machine that slows down slows all arms. Where memory does not hold all of
them at once, or on a GPU, the launches of a round follow one another, also in random order. Memory and
accuracy have passes of their own. While a gate is undecided the experiment measures more and looks
again, up to a budget of time. After every process the results so far are written, so that nothing is lost.
"""

import random
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from compress import runtimes as runtime_room
from compress.bench import host, isolate, log_probabilities, together
from compress.bench.arms import Arm, arms_of, baseline, check_arms
from compress.bench.environment import describe
from compress.bench.flips import flips_of
from compress.bench.judging import compare_arms, judge
from compress.bench.looks import error_share, further_rounds
from compress.bench.material import Material, prepare
from compress.bench.metrics import (
    Metric,
    Stage,
    Subject,
    examples_of,
    find,
    metrics_of,
    quantities,
    suites_of,
)
from compress.bench.report.junit import junit
from compress.bench.report.markdown import markdown
from compress.bench.requests import Requests, Runner
from compress.bench.results import (
    JUNIT_FILE,
    PROGRESS_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    ArmResult,
    Flips,
    Launch,
    Results,
    write_atomically,
)
from compress.core.artifact import Artifact
from compress.core.bench import Bench
from compress.core.errors import CompressError, EnvironmentFault, TargetError, UsageError
from compress.core.events import SILENT, Reporter
from compress.core.facts import Fact
from compress.core.gate import Gate, Judgement, Verdict, check_metrics
from compress.core.measurement import Measurement
from compress.data.corpora import documents
from compress.models.tasks import Task, resolve


def compare(
    before: Path,
    after: Sequence[Path],
    out: Path,
    text: str,
    *,
    task: str = "auto",
    gates: Sequence[Gate | Mapping[str, Any]] = (),
    reporter: Reporter = SILENT,
    options: Bench | Mapping[str, Any] | None = None,
    runner: Runner = isolate.run,
) -> Results:
    """Measure BEFORE and every AFTER and judge the differences.

    Args:
        before: folder of the reference model.
        after: folders of the compressed models, at least one.
        out: where ``results.json`` and ``report.md`` go; other files there are left alone.
        text: what to score on, as `compress.data.corpora.documents` takes it.
        task: name of a task, or ``auto`` to take BEFORE's.
        gates: what must hold.
        reporter: who is told what happens.
        options: settings of the experiment.
        runner: what runs requests in processes; for tests.

    Raises:
        UsageError: an unknown runtime, task, quantity, arm or option.
        ModelError, DataError: a model or the text cannot be used at all.
        TargetError: ``out`` is a file or a model.

    A model that fails while it is measured raises nothing: its row says how it failed.
    """
    settings = Bench.of(options)
    artifacts = [Artifact.open(Path(path)) for path in (before, *after)]
    settings = _with_runtimes(settings, artifacts)
    asked = [gate if isinstance(gate, Gate) else Gate.of(gate) for gate in gates]
    if not after:
        raise UsageError("there is no AFTER to compare with BEFORE", "give at least one more model")
    if not settings.runtimes:
        raise UsageError("no runtime is given", f"known: {', '.join(runtime_room.names())}")
    for name in settings.runtimes:
        runtime_room.find(name)
    _check_target(out)
    work = resolve(task, artifacts[0].config)
    metrics = metrics_of(work, settings)
    check_metrics(asked, quantities(metrics))
    arms = arms_of(
        artifacts[0],
        artifacts[1:],
        list(dict.fromkeys(settings.runtimes)),
        metrics,
        noise_floor=settings.noise_floor,
    )
    check_arms(asked, arms)
    reporter.event("bench.text", source=text)
    texts = documents(text, limit=_most(work, settings))

    def prepared(lengthened: Bench) -> dict[Path, Material]:
        more = texts if lengthened == settings else documents(text, limit=_most(work, lengthened))
        return {artifact.path: prepare(artifact, work, more, lengthened) for artifact in artifacts}

    materials = prepared(settings)
    log_probabilities.check_options(artifacts[0], arms[0].runtime, materials[artifacts[0].path], settings)
    said = {"source": text, "digest": texts.digest, "description": texts.description}
    with tempfile.TemporaryDirectory(prefix="compress-bench-") as scratch:
        experiment = _Experiment(arms, work, settings, out, said, Path(scratch), reporter, runner, prepared)
        experiment.requests.place(materials)
        experiment.run(asked)
        return experiment.finish(asked)


def _with_runtimes(options: Bench, artifacts: Sequence[Artifact]) -> Bench:
    """The options, where nobody chose a runtime with one more for the graphs among the models."""
    if "runtimes" in options.model_fields_set or not any(Fact.ONNX_GRAPH in a.facts for a in artifacts):
        return options
    loading = [name for name in runtime_room.names() if runtime_room.find(name).loads is Fact.ONNX_GRAPH]
    return options.model_copy(update={"runtimes": (*options.runtimes, *loading)})


def _most(task: Task, options: Bench) -> int:
    """Documents of the text that can be needed at most."""
    return options.tokens if task.generates else options.documents


def _check_target(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise TargetError(f"{out} is a file, expected a folder for the report")
    if (out / "config.json").exists():
        raise TargetError(
            f"{out} is a model; a report inside would change what it holds", "give another folder with --out"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(f"{out} cannot be made: {error.strerror or error}") from error


@final
@dataclass(frozen=True)
class _Undecided:
    """Of what more could decide a gate.

    Attributes:
        metrics: their names; none where everything is decided, or nothing more could be measured.
        arms: that the undecided gates are about.
    """

    metrics: Sequence[str]
    arms: Sequence[Arm]


@final
@dataclass
class _Experiment:
    """The measuring of all arms."""

    arms: list[Arm]
    task: Task
    options: Bench
    out: Path
    text: Mapping[str, Any]
    scratch: Path
    reporter: Reporter
    runner: Runner
    prepare: Callable[[Bench], Mapping[Path, Material]]
    order: list[str] = field(default_factory=list)
    looks: int = 1
    last_look: bool = False
    rounds: int = 0

    def __post_init__(self) -> None:
        self.threads = self.options.threads or host.processors()
        self.device = _device(self.options)
        self.environment = describe(self.device, self.threads)
        self._scoring_seconds = self._round_seconds = 0.0
        self._order_generator = random.Random(self.options.seed)
        self.requests = Requests(
            arms=self.arms,
            task=self.task,
            options=self.options,
            folder=self.scratch,
            device=self.device,
            threads=self.threads,
            gpu=self.environment["gpu"]["uuid"] if "gpu" in self.environment else None,
            reporter=self.reporter,
            runner=self.runner,
            order=self._order_generator,
        )

    def run(self, gates: Sequence[Gate]) -> None:
        """All stages of all arms, and further looks while a gate is undecided."""
        started = time.monotonic()
        measured = [arm for arm in self.arms if arm.role != "again"]
        runs = 2 * len(measured) + len(self.arms) * self.options.launches
        with self.reporter.progress("measuring", runs, "run") as advance:
            for arm in measured:
                self._files(arm)
                if runtime_room.find(arm.runtime).loads not in arm.artifact.facts:
                    self.requests.prepare(arm)
            self._write(PROGRESS_FILE)
            for stage in (Stage.MEMORY, Stage.SCORING):
                self._pass(stage, advance)
            self._launches(self.options.launches, advance)
        while (undecided := self._undecided(gates)).metrics:
            left = self.options.budget - (time.monotonic() - started)
            if not self._look_again(undecided, left):
                self.last_look = True
                break
        if self.last_look and self._undecided(gates).metrics:
            self.reporter.message(
                f"undecided after {self.looks} looks: there may be {self.options.looks}, the budget is "
                f"{self.options.budget:g} s, and there must be more to measure"
            )

    def _look_again(self, undecided: "_Undecided", left: float) -> bool:
        """Measure more of what is undecided; whether there was room for that.

        Args:
            undecided: of what more could decide a gate.
            left: seconds of the budget.
        """
        if self.looks >= self.options.looks:
            return False
        stages = {find(name).stage for name in undecided.metrics}
        if Stage.SCORING in stages:
            # The next look scores twice the text.
            left -= 2 * self._scoring_seconds
        rounds = 0
        if Stage.TIMING in stages:
            rounds = further_rounds(self.rounds, self._round_seconds, left)
        if left < 0 or (Stage.TIMING in stages and not rounds):
            return False
        return self._look(undecided, rounds)

    def _look(self, undecided: "_Undecided", rounds: int) -> bool:
        """Measure more of what is undecided, twice the text and some rounds; whether there was more."""
        metrics = [find(name) for name in undecided.metrics]
        scoring = [metric for metric in metrics if metric.stage is Stage.SCORING]
        lengthened = bool(scoring) and self._lengthen(scoring)
        if not (lengthened or rounds):
            return False
        self.looks += 1
        scored = sum(arm.role != "again" for arm in self.arms) if lengthened else 0
        runs = len(undecided.arms) * rounds + scored
        title = f"look {self.looks} of at most {self.options.looks}, at undecided gates"
        with self.reporter.progress(title, runs, "run") as advance:
            if lengthened:
                self._pass(Stage.SCORING, advance)
            self._launches(rounds, advance, undecided)
        return True

    def _pass(self, stage: Stage, advance: Callable[[int], None]) -> None:
        """One stage of every arm; as many processes at once as are sure to fit, which take turns."""
        measured = [arm for arm in self.arms if arm.role != "again" and arm.unavailable is None]
        advance(sum(arm.role != "again" for arm in self.arms) - len(measured))
        for group in together.groups(measured, self.device):
            begun = time.monotonic()
            replies = self.requests.ask(group, stage)
            if stage is Stage.SCORING:
                self._scoring_seconds += time.monotonic() - begun
            for arm, reply in zip(group, replies, strict=True):
                if reply is not None:
                    self._take(arm, stage, reply)
            self._write(PROGRESS_FILE)
            advance(len(group))

    def _launches(
        self, rounds: int, advance: Callable[[int], None], undecided: "_Undecided | None" = None
    ) -> None:
        """Some rounds of timed launches, the arms of each in random order.

        Args:
            rounds: how many.
            advance: told of the launches of each.
            undecided: what is timed; without it everything.
        """
        asked = self.arms if undecided is None else undecided.arms
        begun = time.monotonic()
        for _ in range(rounds):
            self.rounds += 1
            arms = self._order_generator.sample(asked, len(asked))
            running = [arm for arm in arms if _can_run(arm)]
            groups = [running] if together.fit(running, self.device) else [[arm] for arm in running]
            for group in groups:
                self._launch(group, self.rounds, None if undecided is None else undecided.metrics)
                self._write(PROGRESS_FILE)
            advance(len(arms))
        if rounds:
            self._round_seconds = (time.monotonic() - begun) / rounds

    def _undecided(self, gates: Sequence[Gate]) -> "_Undecided":
        """What more could decide a gate: metrics, and the arms that it is about."""
        quantities: set[str] = set()
        concerned: set[str] = set()
        results = [arm.result() for arm in self.arms]
        for gate in gates if self.options.budget else ():
            for judgement in judge([gate], results, self.options, self._error_share):
                if judgement.verdict is Verdict.UNDECIDED and not self._complete(judgement):
                    quantities.add(judgement.metric)
                    concerned |= self._concerned(gate, judgement)
        metrics = [
            name
            for name in dict.fromkeys(name for arm in self.arms for name in arm.metrics)
            if find(name).stage in (Stage.TIMING, Stage.SCORING)
            and any(quantity.name in quantities for quantity in find(name).quantities)
        ]
        return _Undecided(metrics, [arm for arm in self.arms if arm.name in concerned])

    def _concerned(self, gate: Gate, judgement: Judgement) -> set[str]:
        """Names of the arms that a judgement rests on, the one that shows the noise included."""
        if gate.arms.damaged is not None:
            return {arm.name for arm in self.arms}
        pair = {judgement.before, judgement.after}
        again = {
            arm.name
            for arm in self.arms
            if arm.role == "again" and arm.reference is not None and arm.reference.name in pair
        }
        return pair | again

    @property
    def _error_share(self) -> float:
        return error_share(self.looks, self.options.looks, last=self.last_look)

    def _complete(self, judgement: Judgement) -> bool:
        """Whether a gate judged all that there is to measure."""
        arm = next(arm for arm in self.arms if arm.name == judgement.after)
        return arm.measurements[judgement.metric].complete

    def _lengthen(self, metrics: Collection[Metric]) -> bool:
        """Take twice of what these metrics are scored on; whether there was more of it."""
        if self.options.stored_log_probabilities is not None:
            return False
        of_examples = any(metric.of_examples for metric in metrics)
        of_text = any(not metric.of_examples for metric in metrics)
        sizes = [*(("tokens", "documents") if of_text else ()), *(("suite_limit",) if of_examples else ())]
        doubled = {name: 2 * value for name in sizes if (value := getattr(self.options, name)) is not None}
        longer = self.options.model_copy(update=doubled)
        if of_text:
            materials = self.prepare(longer)
            of_text = any(
                len(material.sequences) > self.requests.sequences(path)
                for path, material in materials.items()
            )
        # Of a suite without a limit everything was measured.
        if not of_text and "suite_limit" not in doubled:
            return False
        self.options = self.requests.options = longer
        if of_text:
            self.requests.place(materials)
        return True

    def finish(self, gates: Sequence[Gate]) -> Results:
        """Judge, and write the final files."""
        results = self._write(RESULTS_FILE, gates)
        write_atomically(self.out / REPORT_FILE, markdown(results))
        write_atomically(self.out / JUNIT_FILE, junit(results))
        (self.out / PROGRESS_FILE).unlink(missing_ok=True)
        for judgement in results.judgements:
            arms = f"{judgement.after} against {judgement.before}"
            self.reporter.message(
                f"{judgement.verdict.value}: {judgement.gate} ({arms}): {judgement.explanation}"
            )
        self.reporter.message(f"report: {self.out / REPORT_FILE}")
        return results

    def _files(self, arm: Arm) -> None:
        subject = Subject(artifact=arm.artifact, task=self.task, options=self.options)
        for name in arm.metrics_at(Stage.FILES):
            try:
                arm.measurements.update(find(name).measure(subject))
            except CompressError as error:
                arm.measurements.update(find(name).missing(error.message))

    def _take(self, arm: Arm, stage: Stage, reply: Mapping[str, Any]) -> None:
        """Keep what a process has measured."""
        arm.measurements.update(
            {name: Measurement.model_validate(value) for name, value in reply["measurements"].items()}
        )
        if stage is Stage.SCORING and not self.requests.same_tokens(arm):
            reason = "BEFORE's tokenizer gives other tokens for the same text"
            arm.measurements.update(
                {
                    name: value.missing(reason, unit=value.unit, better=value.better)
                    for name, value in arm.measurements.items()
                    if name.startswith("fidelity.")
                }
            )

    def _launch(self, arms: Sequence[Arm], number: int, metrics: Collection[str] | None) -> None:
        """One launch of each of these arms, taking turns."""
        self.order += [arm.name for arm in arms]
        replies = self.requests.ask(arms, Stage.TIMING, launch=number, metrics=metrics)
        for arm, reply in zip(arms, replies, strict=True):
            if reply is None:
                continue
            seen = dict(reply.get("launch", {}))
            seen["conditions"] = {**seen.get("conditions", {}), "taking_turns": len(arms)}
            for reason in arm.add_launch(reply["measurements"], Launch(round=number, **seen)):
                self.reporter.message(f"{arm.name}: launch {number} cannot be trusted: {reason}")

    def _write(self, name: str, gates: Sequence[Gate] | None = None) -> Results:
        """Write what was measured; with gates, judged and complete."""
        complete = gates is not None
        arms = [arm.result() for arm in self.arms]
        results = Results(
            complete=complete,
            command=_command(),
            task=self.task.name,
            text=dict(self.text),
            options=self.options.model_dump(mode="json"),
            environment=self.environment,
            order=tuple(self.order),
            looks=self.looks,
            last_look=self.last_look,
            arms=tuple(arms),
            comparisons=tuple(compare_arms(arms, self.options)) if complete else (),
            flips=tuple(self._flips(arms)) if complete else (),
            judgements=tuple(judge(gates or (), arms, self.options, self._error_share)),
        )
        results.write(self.out / name)
        return results

    def _flips(self, arms: Sequence[ArmResult]) -> Iterator[Flips]:
        suites = [examples_of(source, self.options) for source in suites_of(self.options)]
        for arm in arms:
            if arm.role == "after":
                yield from flips_of(baseline(arm, arms), arm, suites)


def _can_run(arm: Arm) -> bool:
    """Whether a timed launch of an arm can still give something."""
    model = arm.reference or arm if arm.role == "again" else arm
    faults = (*arm.faults, *model.faults)
    return model.unavailable is None and not any(f.stage.startswith(Stage.TIMING.value) for f in faults)


def _command() -> tuple[str, ...]:
    """The words of the command that was given; of the program its name alone, since paths differ."""
    program = Path(sys.argv[0]).name
    return ("compress" if program == "__main__.py" else program, *sys.argv[1:])


def _device(options: Bench) -> str:
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault("no CUDA device is at hand", "set bench option device: cpu")
    if options.device != "auto":
        return options.device
    return "cuda" if torch.cuda.is_available() else "cpu"
