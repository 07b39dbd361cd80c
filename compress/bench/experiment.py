"""One experiment, before and after: all arms on the same tokens, every measured run in its own process.

Timed launches of all arms are interleaved in seeded random order, round after round, so that a machine
that slows down slows all arms. Memory and accuracy have passes of their own. After every process the
results so far are written, so that nothing is lost.
"""

import os
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from compress import runtimes as runtime_room
from compress.bench import isolate
from compress.bench.arms import Arm, arms_of, check_arms
from compress.bench.environment import describe
from compress.bench.judging import compare_arms, judge
from compress.bench.material import Material, prepare
from compress.bench.metrics import Stage, Subject, find, quantities
from compress.bench.options import Options
from compress.bench.report.markdown import markdown
from compress.bench.results import PROGRESS_FILE, REPORT_FILE, RESULTS_FILE, Results, write_atomically
from compress.core.artifact import Artifact
from compress.core.errors import CompressError, EnvironmentFault, TargetError, UsageError
from compress.core.events import SILENT, Reporter
from compress.core.gate import Gate, check_metrics
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
    runtimes: Sequence[str] = ("torch-eager",),
    gates: Sequence[Gate | Mapping[str, Any]] = (),
    reporter: Reporter = SILENT,
    options: Options | Mapping[str, Any] | None = None,
    runner: Runner = isolate.run,
) -> Results:
    """Measure BEFORE and every AFTER and judge the differences.

    Args:
        before: folder of the reference model.
        after: folders of the compressed models, at least one.
        out: where ``results.json`` and ``report.md`` go; other files there are left alone.
        text: what to score on, as `compress.data.corpora.documents` takes it.
        task: name of a task, or ``auto`` to take BEFORE's.
        runtimes: how to run the models; the first is the one that gates mean unless they name another.
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
    settings = Options.of(options)
    asked = [gate if isinstance(gate, Gate) else Gate.of(gate) for gate in gates]
    if not after:
        raise UsageError("there is no AFTER to compare with BEFORE", "give at least one more model")
    if not runtimes:
        raise UsageError("no runtime is given", f"known: {', '.join(runtime_room.names())}")
    for name in runtimes:
        runtime_room.find(name)
    _check_target(out)
    artifacts = [Artifact.open(Path(path)) for path in (before, *after)]
    work = resolve(task, artifacts[0].config)
    check_metrics(asked, quantities(work.metrics))
    arms = arms_of(artifacts[0], artifacts[1:], list(dict.fromkeys(runtimes)), work)
    check_arms(asked, arms)
    most = settings.tokens if work.generates else settings.documents
    reporter.event("bench.text", source=text)
    texts = documents(text, limit=most)
    materials = {artifact.path: prepare(artifact, work, texts, settings) for artifact in artifacts}
    said = {"source": text, "digest": texts.digest, "description": texts.description}
    with tempfile.TemporaryDirectory(prefix="compress-bench-") as scratch:
        experiment = _Experiment(arms, work, settings, out, said, Path(scratch), reporter, runner)
        experiment.place(materials)
        experiment.run(asked)
        return experiment.finish(asked)


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
    options: Options
    out: Path
    text: Mapping[str, Any]
    scratch: Path
    reporter: Reporter
    runner: Runner
    order: list[str] = field(default_factory=list)
    materials: dict[Path, tuple[Path, Material]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.threads = self.options.threads or _cores()
        self.device = _device(self.options)
        self.environment = describe(self.device, self.threads)

    def place(self, materials: Mapping[Path, Material]) -> None:
        """Put the material where the workers find it."""
        for number, (path, material) in enumerate(materials.items()):
            file = self.scratch / f"material-{number}.safetensors"
            material.save(file)
            self.materials[path] = (file, material)

    def run(self, gates: Sequence[Gate]) -> None:
        """All stages of all arms."""
        runs = len(self.arms) * (2 + self.options.launches)
        with self.reporter.progress("measuring", runs, "run") as advance:
            for arm in self.arms:
                self._files(arm)
            self._write(PROGRESS_FILE, gates)
            for stage in (Stage.MEMORY, Stage.SCORING):
                for arm in self.arms:
                    self._once(arm, stage)
                    self._write(PROGRESS_FILE, gates)
                    advance(1)
            generator = random.Random(self.options.seed)
            for number in range(self.options.launches):
                for arm in generator.sample(self.arms, len(self.arms)):
                    self._launch(arm, number)
                    self._write(PROGRESS_FILE, gates)
                    advance(1)

    def finish(self, gates: Sequence[Gate]) -> Results:
        """Judge, and write the final files."""
        results = self._write(RESULTS_FILE, gates, complete=True)
        write_atomically(self.out / REPORT_FILE, markdown(results))
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
        reply = self._request(arm, stage)
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
        if any(fault.stage.startswith(Stage.TIMING.value) for fault in arm.faults):
            return
        self.order.append(arm.name)
        reply = self._request(arm, Stage.TIMING, launch=number + 1)
        if reply is not None:
            arm.add_launch(reply["measurements"])

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
            "threads": self.threads,
            "options": self.options.model_dump(mode="json"),
            "material": str(self.materials[arm.artifact.path][0]),
            "reference": str(reference.artifact.path.resolve()) if reference else None,
            "reference_runtime": reference.runtime if reference else None,
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

    def _write(self, name: str, gates: Sequence[Gate], *, complete: bool = False) -> Results:
        arms = [arm.result() for arm in self.arms]
        results = Results(
            complete=complete,
            command=tuple(sys.argv),
            task=self.task.name,
            text=dict(self.text),
            options=self.options.model_dump(mode="json"),
            environment=self.environment,
            order=tuple(self.order),
            arms=tuple(arms),
            comparisons=tuple(compare_arms(arms, self.options)) if complete else (),
            judgements=tuple(judge(gates, arms, self.options)) if complete else (),
        )
        results.write(self.out / name)
        return results


def _cores() -> int:
    """Cores that this process may use; where the system does not say, all there are."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1


def _device(options: Options) -> str:
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault("no CUDA device is at hand", "set bench option device: cpu")
    if options.device != "auto":
        return options.device
    return "cuda" if torch.cuda.is_available() else "cpu"
