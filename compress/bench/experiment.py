"""One experiment, before and after: all arms on the same tokens, every measured run in its own process.

Timed launches of all arms are interleaved in seeded random order, round after round, so that a machine
that slows down slows all arms. Memory and accuracy have passes of their own. While a gate is undecided the
experiment measures twice as much and looks again, up to a budget of time. After every process the results
so far are written, so that nothing is lost.
"""

import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from compress import runtimes as runtime_room
from compress.bench import host, isolate, log_probabilities
from compress.bench.arms import Arm, arms_of, baseline, check_arms
from compress.bench.environment import describe, holds_context
from compress.bench.flips import flips_of
from compress.bench.judging import compare_arms, judge
from compress.bench.material import Material, prepare
from compress.bench.metrics import Stage, Subject, examples_of, find, metrics_of, quantities, suites_of
from compress.bench.report.junit import junit
from compress.bench.report.markdown import markdown
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
from compress.core.gate import Gate, Judgement, Verdict, check_metrics
from compress.core.measurement import Measurement
from compress.data.corpora import documents
from compress.models.tasks import Task, resolve

Runner = Callable[..., isolate.Reply]


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
        runner: what runs one request in a process; for tests.

    Raises:
        UsageError: an unknown runtime, task, quantity, arm or option.
        ModelError, DataError: a model or the text cannot be used at all.
        TargetError: ``out`` is a file or a model.

    A model that fails while it is measured raises nothing: its row says how it failed.
    """
    settings = Bench.of(options)
    asked = [gate if isinstance(gate, Gate) else Gate.of(gate) for gate in gates]
    if not after:
        raise UsageError("there is no AFTER to compare with BEFORE", "give at least one more model")
    if not settings.runtimes:
        raise UsageError("no runtime is given", f"known: {', '.join(runtime_room.names())}")
    for name in settings.runtimes:
        runtime_room.find(name)
    _check_target(out)
    artifacts = [Artifact.open(Path(path)) for path in (before, *after)]
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
        experiment.place(materials)
        experiment.run(asked)
        return experiment.finish(asked)


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
    materials: dict[Path, tuple[Path, Material]] = field(default_factory=dict)
    looks: int = 1
    rounds: int = 0

    def __post_init__(self) -> None:
        self.threads = self.options.threads or host.processors()
        self.device = _device(self.options)
        self.environment = describe(self.device, self.threads)
        self._seconds = dict.fromkeys(Stage, 0.0)
        self._order_generator = random.Random(self.options.seed)

    def place(self, materials: Mapping[Path, Material]) -> None:
        """Put the material where the workers find it."""
        for number, (path, material) in enumerate(materials.items()):
            file = self.scratch / f"material-{number}.safetensors"
            material.save(file)
            self.materials[path] = (file, material)

    def run(self, gates: Sequence[Gate]) -> None:
        """All stages of all arms, and further looks while a gate is undecided."""
        started = time.monotonic()
        measured = [arm for arm in self.arms if arm.role != "again"]
        runs = 2 * len(measured) + len(self.arms) * self.options.launches
        with self.reporter.progress("measuring", runs, "run") as advance:
            for arm in measured:
                self._files(arm)
            self._write(PROGRESS_FILE)
            for stage in (Stage.MEMORY, Stage.SCORING):
                self._pass(stage, advance)
            self._launches(self.options.launches, advance)
        while stages := self._undecided(gates):
            if self.looks >= self.options.looks:
                break
            seconds = sum(self._cost(stage) for stage in stages)
            if time.monotonic() - started + seconds > self.options.budget:
                self.reporter.message(
                    f"undecided after {self.looks} looks; one more takes about {seconds:.0f} s, "
                    f"which the budget of {self.options.budget:g} s does not leave"
                )
                break
            if not self._look(stages):
                self.reporter.message("undecided, and there is no more text to score")
                break

    def _look(self, stages: set[Stage]) -> bool:
        """Measure twice as much of what is undecided; whether there was more to measure."""
        lengthened = Stage.SCORING in stages and self._lengthen()
        rounds = self.rounds if Stage.TIMING in stages else 0
        if not (lengthened or rounds):
            return False
        self.looks += 1
        scored = sum(arm.role != "again" for arm in self.arms) if lengthened else 0
        runs = len(self.arms) * rounds + scored
        title = f"look {self.looks} of at most {self.options.looks}, at undecided gates"
        with self.reporter.progress(title, runs, "run") as advance:
            if lengthened:
                self._pass(Stage.SCORING, advance)
            self._launches(rounds, advance)
        return True

    def _pass(self, stage: Stage, advance: Callable[[int], None]) -> None:
        """One stage of every arm, in order."""
        for arm in self.arms:
            if arm.role != "again":
                self._once(arm, stage)
                self._write(PROGRESS_FILE)
                advance(1)

    def _launches(self, rounds: int, advance: Callable[[int], None]) -> None:
        """Some rounds of timed launches, the arms of each in random order."""
        for _ in range(rounds):
            self.rounds += 1
            for arm in self._order_generator.sample(self.arms, len(self.arms)):
                self._launch(arm, self.rounds)
                self._write(PROGRESS_FILE)
                advance(1)

    def _undecided(self, gates: Sequence[Gate]) -> set[Stage]:
        """The stages at which more measuring could decide a gate."""
        if self.options.budget == 0 or not gates:
            return set()
        results = [arm.result() for arm in self.arms]
        open_metrics = {
            judgement.metric
            for judgement in judge(gates, results, self.options)
            if judgement.verdict is Verdict.UNDECIDED and not self._complete(judgement)
        }
        metrics = {find(name) for arm in self.arms for name in arm.metrics}
        return {
            metric.stage
            for metric in metrics
            if metric.stage in (Stage.TIMING, Stage.SCORING)
            and any(quantity.name in open_metrics for quantity in metric.quantities)
        }

    def _complete(self, judgement: Judgement) -> bool:
        """Whether a gate judged all that there is to measure."""
        arm = next(arm for arm in self.arms if arm.name == judgement.after)
        return arm.measurements[judgement.metric].complete

    def _cost(self, stage: Stage) -> float:
        """Seconds of the next look at a stage: twice the text, or as many launches as there were."""
        return self._seconds[stage] * (2 if stage is Stage.SCORING else 1)

    def _lengthen(self) -> bool:
        """Take twice the text; whether there was more of it."""
        if self.options.stored_log_probabilities is not None:
            return False
        sizes = ("tokens", "documents", "suite_limit")
        doubled = {name: 2 * value for name in sizes if (value := getattr(self.options, name)) is not None}
        longer = self.options.model_copy(update=doubled)
        materials = self.prepare(longer)
        grown = any(
            len(material.sequences) > len(self.materials[path][1].sequences)
            for path, material in materials.items()
        )
        if not grown and self.options.suite_limit is None:
            return False
        self.options = longer
        self.place(materials)
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

    def _once(self, arm: Arm, stage: Stage) -> None:
        begun = time.monotonic()
        reply = self._request(arm, stage)
        if stage is Stage.SCORING:
            self._seconds[stage] = self._seconds[stage] + time.monotonic() - begun
        if reply is not None:
            arm.measurements.update(
                {name: Measurement.model_validate(value) for name, value in reply["measurements"].items()}
            )
            if stage is Stage.SCORING and not self._same_tokens(arm):
                reason = "BEFORE's tokenizer gives other tokens for the same text"
                arm.measurements.update(
                    {
                        name: value.missing(reason, unit=value.unit, better=value.better)
                        for name, value in arm.measurements.items()
                        if name.startswith("fidelity.")
                    }
                )

    def _launch(self, arm: Arm, number: int) -> None:
        failed = arm if arm.role != "again" else arm.reference or arm
        if any(fault.stage.startswith(Stage.TIMING.value) for fault in (*arm.faults, *failed.faults)):
            return
        if failed.unavailable is not None:
            return
        begun = time.monotonic()
        self.order.append(arm.name)
        reply = self._request(arm, Stage.TIMING, launch=number)
        if reply is not None:
            watched = Launch(round=number, **reply.get("launch", {}))
            for reason in arm.add_launch(reply["measurements"], watched):
                self.reporter.message(f"{arm.name}: launch {number} cannot be trusted: {reason}")
        self._seconds[Stage.TIMING] += time.monotonic() - begun

    def _same_tokens(self, arm: Arm) -> bool:
        if arm.reference is None:
            return True
        ours = self.materials[arm.artifact.path][1].protocol.get("tokens")
        return ours == self.materials[arm.reference.artifact.path][1].protocol.get("tokens")

    def _reference(self, arm: Arm, stage: Stage) -> Arm | None:
        """The arm whose model an AFTER is compared with while scoring."""
        if stage is not Stage.SCORING or arm.reference is None or not self._same_tokens(arm):
            return None
        if arm.reference.unavailable is None:
            return arm.reference
        return next((a for a in self.arms if a.role == "before" and a.unavailable is None), None)

    def _request(self, arm: Arm, stage: Stage, launch: int = 0) -> Mapping[str, Any] | None:
        """One measured process; ``None`` where it gave nothing, which the arm then says."""
        if arm.unavailable is not None:
            return None
        named = f"{stage.value} {launch}" if launch else stage.value
        self.reporter.event("bench.run", arm=arm.name, stage=named)
        reference = self._reference(arm, stage)
        request = {
            "artifact": str(arm.artifact.path.resolve()),
            "runtime": arm.runtime,
            "task": self.task.name,
            "stage": stage.value,
            "metrics": arm.metrics_at(stage),
            "device": self.device,
            "gpu": self._gpu(),
            "threads": self.threads,
            "options": self.options.model_dump(mode="json"),
            "material": str(self.materials[arm.artifact.path][0]),
            "reference": str(reference.artifact.path.resolve()) if reference else None,
            "reference_runtime": reference.runtime if reference else None,
            "cgroup": f"compress-bench-{os.getpid()}" if stage is Stage.MEMORY else None,
            "stored": (reference or arm) is self.arms[0] and stage is Stage.SCORING,
        }
        reply = self.runner(request, stage=named, time_limit=self.options.time_limit, threads=self.threads)
        if reply.fault is not None:
            arm.faults.append(reply.fault)
            arm.set_missing(stage, f"{reply.fault.kind}: {reply.fault.message}")
            self.reporter.message(f"{arm.name}: {named} {reply.fault.kind}: {reply.fault.message}")
            return None
        if "unavailable" in reply.document:
            reason = str(reply.document["unavailable"])
            arm.unavailable = reason
            arm.facts["unavailable"] = reason
            for other in (Stage.TIMING, Stage.MEMORY, Stage.SCORING):
                arm.set_missing(other, reason)
            self.reporter.message(f"{arm.name}: n/a, {reason}")
            return None
        arm.facts.update(reply.document["facts"] if stage is Stage.MEMORY else {})
        return reply.document

    def _gpu(self) -> dict[str, Any] | None:
        """Which GPU the models run on, and whether this process holds a context there."""
        if "gpu" not in self.environment:
            return None
        return {"uuid": self.environment["gpu"]["uuid"], "shared": holds_context()}

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
            arms=tuple(arms),
            comparisons=tuple(compare_arms(arms, self.options)) if complete else (),
            flips=tuple(self._flips(arms)) if complete else (),
            judgements=tuple(judge(gates or (), arms, self.options)),
        )
        results.write(self.out / name)
        return results

    def _flips(self, arms: Sequence[ArmResult]) -> Iterator[Flips]:
        suites = [examples_of(source, self.options) for source in suites_of(self.options)]
        for arm in arms:
            if arm.role == "after":
                yield from flips_of(baseline(arm, arms), arm, suites)


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
