"""The engine: plan a recipe, run it, resume it, verify what it wrote.

A plan is made before anything is written: it looks at the model, walks the chain of facts, asks each pass
for what it needs, and compares that with the machine. Running a plan redoes only what is not there yet.
"""

import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.core.artifact import RUN_FILE, Artifact, Lineage, StepRecord, digest_of
from compress.core.errors import EnvironmentFault, ModelError, PlanError, VerificationError
from compress.core.events import SILENT, Reporter
from compress.core.facts import MEANING, Fact
from compress.core.identity import code_digest, libraries, step_key
from compress.core.passes import Needs, Pass, find, name_of
from compress.core.recipe import Recipe
from compress.core.run import CalibrationSource, Device, Run
from compress.core.target import Target

if TYPE_CHECKING:
    from compress.sweep.verification import Verified

PLAN_FILE = "compress.plan.json"
RUNS_FOLDER = Path("runs")


@dataclass(frozen=True)
class PlannedStep:
    """One step of a plan.

    Attributes:
        use: name of the pass.
        method: the pass with its options.
        target: where its artifact goes.
        key: what it would compute; ``None`` while the step before it has no result yet.
        done: whether an artifact with this key is there.
        needs: what it will take; ``None`` where that can only be known once the step before is done.
    """

    use: str
    method: Pass
    target: Target
    key: str | None
    done: bool
    needs: Needs | None


@dataclass(frozen=True)
class Plan:
    """A recipe made ready to run on this machine.

    Attributes:
        recipe: what to do.
        source: the model.
        steps: the steps in order.
        folder: of the whole run.
        single: whether ``folder`` is the artifact of the last step itself.
        run: the circumstances that all steps share.
        reporter: who is told what happens.
        fresh: whether to start over.
    """

    recipe: Recipe
    source: Artifact
    steps: tuple[PlannedStep, ...]
    folder: Target
    single: bool
    run: Run
    reporter: Reporter
    fresh: bool

    @property
    def already_done(self) -> bool:
        """Whether every artifact is there."""
        return all(step.done for step in self.steps)

    def describe(self) -> list[dict[str, Any]]:
        """One row a step: what it is, whether it is done, what it is predicted to take."""
        rows = []
        for step in self.steps:
            row: dict[str, Any] = {
                "step": step.use,
                "target": str(step.target.path),
                "key": step.key,
                "done": step.done,
            }
            if step.needs is not None and not step.done:
                row |= {
                    "disk_bytes": step.needs.disk_bytes,
                    "host_bytes": step.needs.host_bytes,
                    "device_bytes": step.needs.device_bytes,
                    "seconds": step.needs.seconds,
                }
            rows.append(row)
        return rows


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes:
        artifacts: folders of the artifacts that were kept, in the order of the steps.
        final: the artifact of the last step.
        results: of the benchmark, or ``None`` where the recipe measures nothing.
        exit_code: 0, or that of the worst gate.
        did_nothing: everything was there already.
    """

    artifacts: list[Path]
    final: Path
    results: Any = None
    exit_code: int = 0
    did_nothing: bool = False


@dataclass(frozen=True)
class VerificationReport:
    """What `verify` held true of an artifact."""

    path: Path
    digest: str
    weights: "Verified | None"


def plan(
    recipe: Recipe,
    out: Path | None = None,
    *,
    reporter: Reporter = SILENT,
    fresh: bool = False,
    single: bool = False,
) -> Plan:
    """Look at everything that can be known before work starts, and refuse what cannot work.

    Args:
        recipe: what to do.
        out: folder of the run; below ``runs/`` where none is given.
        fresh: start over instead of taking up what is there.
        single: the folder is the artifact of the last step itself; otherwise it holds one folder a step
            and the report.

    Raises:
        CompressError: of the kind that fits; nothing has been written.
    """
    from compress.models.preflight import examine
    from compress.models.source import resolve

    source = Artifact.open(resolve(recipe.model, trust_remote_code=recipe.trust_remote_code))
    _check_chain(recipe, source)
    folder = Target(out or RUNS_FOLDER / source.path.resolve().name, "compress.json" if single else PLAN_FILE)
    folder.claim()
    run = _circumstances(recipe, reporter)
    _check_texts(recipe, source, run)
    _check_bench(recipe, source)
    text = run.calibration.text if run.calibration is not None else None
    examine(
        source,
        trust_remote_code=recipe.trust_remote_code,
        task=recipe.task,
        reporter=reporter,
        needs_tokenizer=text is not None and not text.endswith(".safetensors"),
    )
    steps = _planned(recipe, source, folder, run, single=single, fresh=fresh)
    _check_machine(steps, folder, reporter)
    return Plan(recipe, source, steps, folder, single, run, reporter, fresh)


def execute(planned: Plan) -> RunResult:
    """Do what is not done yet, measure, and judge.

    Raises:
        CompressError: of the kind that fits; finished steps and blocks are kept for the next run.
    """
    import torch

    torch.set_num_threads(planned.run.threads)
    reporter = planned.reporter
    with planned.folder.lock():
        nothing_to_do = planned.already_done and not planned.fresh
        if nothing_to_do:
            reporter.message(f"nothing to do: {planned.steps[-1].target.path} is up to date")
        if not planned.single:
            planned.folder.path.mkdir(parents=True, exist_ok=True)
            (planned.folder.path / PLAN_FILE).write_text(
                json.dumps({"recipe": planned.recipe.model_dump(mode="json")}, indent=1) + "\n",
                encoding="utf-8",
            )
        current = planned.source
        for step in planned.steps:
            current = _step(planned, step, current)
        artifacts = [step.target.path for step in planned.steps if step.target.path.is_dir()]
        if planned.recipe.keep == "last":
            for path in artifacts[:-1]:
                shutil.rmtree(path)
            artifacts = artifacts[-1:]
        results = _measure(planned, artifacts)
    exit_code = int(results.exit_code) if results is not None else 0
    return RunResult(artifacts, current.path, results, exit_code, nothing_to_do)


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: Path | None = None,
    *,
    fresh: bool = False,
    single: bool = False,
    reporter: Reporter = SILENT,
) -> RunResult:
    """Plan and execute a recipe.

    Args:
        recipe: a recipe, its plain data, or the path of a YAML file.

    Raises:
        CompressError: of the kind that fits.
    """
    if isinstance(recipe, str | Path):
        recipe = Recipe.load(Path(recipe))
    elif not isinstance(recipe, Recipe):
        recipe = Recipe.of(recipe)
    return execute(plan(recipe, out, reporter=reporter, fresh=fresh, single=single))


def verify(path: Path, *, reporter: Reporter = SILENT, trust_remote_code: bool = False) -> VerificationReport:
    """Load a finished artifact block by block and hold every weight against its lineage.

    Raises:
        ModelError: the folder is damaged, or was not made by compress.
        VerificationError: a file or a weight is not what it was when the artifact was finished.
    """
    from compress.sweep.verification import verify_weights

    artifact = Artifact.open(path)
    if artifact.lineage is None:
        raise ModelError(
            f"{path} has no lineage (compress.json), so there is nothing to hold it against",
            "verify an artifact that compress made",
        )
    digest = artifact.digest
    if digest != artifact.lineage.digest:
        raise VerificationError(
            f"{path} holds {digest[:12]}, and was finished as {artifact.lineage.digest[:12]}",
            "a file was changed after it was made: make the artifact again",
        )
    last = artifact.lineage.steps[-1].circumstances
    run_ = Run(task=str(last.get("task", "auto")), reporter=reporter, trust_remote_code=trust_remote_code)
    weights = verify_weights(artifact, artifact.lineage, run_) if artifact.lineage.tensors else None
    return VerificationReport(path, digest, weights)


def inspect(path: Path) -> dict[str, Any]:
    """What a folder holds, from its headers: facts, architecture, lineage, sizes by part."""
    from compress.bench.metrics.size import measure_size

    artifact = Artifact.open(path)
    document: dict[str, Any] = {
        "path": str(artifact.path),
        "digest": artifact.digest,
        "facts": sorted(fact.value for fact in artifact.facts),
        "architecture": (
            artifact.config.get("architectures") or [artifact.config.get("model_type", "unknown")]
        )[0],
        "size": measure_size(artifact),
    }
    if artifact.lineage is not None:
        document["lineage"] = [
            {"use": step.use, "options": dict(step.options), "key": step.key, "digest": step.digest}
            for step in artifact.lineage.steps
        ]
    return document


# -- planning --------------------------------------------------------------------------------------


def _check_chain(recipe: Recipe, source: Artifact) -> None:
    """Walk the chain of facts: what each step needs must be true when it is its turn."""
    facts = set(source.facts)
    broken_by: dict[Fact, str] = {}
    for index, step in enumerate(recipe.steps):
        method = step.built()
        missing = sorted(method.needs - facts)
        if missing:
            fact = missing[0]
            culprit = broken_by.get(fact)
            where = f"step {index} ({step.use}) needs {MEANING[fact]}"
            if culprit:
                raise PlanError(f"{where}, which {culprit} takes away", f"put {step.use} before {culprit}")
            raise PlanError(
                f"{where}, which {source.path} does not have", "start from the original float model"
            )
        facts = (facts - method.breaks) | method.gives
        broken_by |= dict.fromkeys(method.breaks, step.use)


def _circumstances(recipe: Recipe, reporter: Reporter) -> Run:
    data = recipe.data
    calibration = None
    if data.calibration is not None:
        calibration = CalibrationSource(data.calibration, data.samples, data.sequence_length, data.batch_size)
    return Run(
        task=recipe.task,
        seed=recipe.seed,
        device=_device(recipe.device),
        threads=recipe.threads or os.cpu_count() or 1,
        calibration=calibration,
        trust_remote_code=recipe.trust_remote_code,
        reporter=reporter,
    )


def _device(asked: str) -> Device:
    import torch

    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise EnvironmentFault("device cuda was asked for, and torch sees no GPU", "use --device cpu")
    return "cuda" if asked == "cuda" or (asked == "auto" and available) else "cpu"


def _check_texts(recipe: Recipe, source: Artifact, run: Run) -> None:
    from compress.data import calibration, corpora
    from compress.models.positions import positions

    if run.calibration is not None:
        room, wanted = positions(source.config), run.calibration.sequence_length
        if room is not None and wanted > room:
            raise PlanError(
                f"calibration sequences of {wanted} tokens are longer than the model's {room} positions",
                f"set data.sequence_length to at most {room} (--sequence-length {room})",
            )
        calibration.check(run.calibration)
    if recipe.bench is not None:
        if recipe.data.eval is None:
            raise PlanError("the recipe has a bench and no text to measure on", "set data.eval")
        corpora.check(recipe.data.eval)


def _check_bench(recipe: Recipe, source: Artifact) -> None:
    """Refuse now what the benchmark would refuse after hours of compressing."""
    if recipe.bench is None:
        return
    from compress import runtimes
    from compress.bench.metrics import metrics_of, quantities
    from compress.bench.options import Options
    from compress.core.gate import check_metrics
    from compress.models.tasks import resolve

    options = Options.of(recipe.bench.options)
    for name in recipe.bench.runtimes:
        runtimes.find(name)
    metrics = metrics_of(resolve(recipe.task, source.config), options)
    check_metrics(recipe.gates, quantities(metrics))


def _step_circumstances(method: Pass, source: Artifact, run: Run) -> dict[str, Any]:
    """What of the run can change the bytes of a step, as it is recorded and as it enters the key."""
    circumstances: dict[str, Any] = {"task": run.task, "device": run.device, "threads": run.threads}
    if method.calibrated and run.calibration is not None:
        from compress.data.calibration import digest_of_source

        circumstances |= {
            "seed": run.seed,
            "calibration": digest_of_source(run.calibration, source.path, run.seed),
            "samples": run.calibration.samples,
            "sequence_length": run.calibration.sequence_length,
            "batch_size": run.calibration.batch_size,
        }
    return circumstances


def _planned(
    recipe: Recipe, source: Artifact, folder: Target, run: Run, *, single: bool, fresh: bool
) -> tuple[PlannedStep, ...]:
    steps: list[PlannedStep] = []
    methods = [step.built() for step in recipe.steps]
    recorded = _recorded_digests(folder, len(methods), recipe, single=single)
    parent: Artifact | None = source
    parent_digest: str | None = source.digest
    for index, method in enumerate(methods):
        use = name_of(method)
        target = _step_target(folder, index, use, len(methods), single=single)
        key = None
        if parent_digest is not None:
            key = step_key(parent_digest, method, _step_circumstances(method, source, run))
        present = _present(target, key)
        done = not fresh and (present is not None or (key is not None and key in recorded))
        needs = None
        if parent is not None and not done:
            needs = method.check(parent, replace(run, scratch=target.progress))
        steps.append(PlannedStep(use, method, target, key, done, needs))
        parent = present if done else None
        parent_digest = (present.digest if present else recorded.get(key or "")) if done else None
    return tuple(steps)


def _step_target(folder: Target, index: int, use: str, count: int, *, single: bool) -> Target:
    last = index == count - 1
    path = folder.path if single and last else folder.path / f"{index + 1:02d}-{use}"
    return Target(path, "compress.json")


def _present(target: Target, key: str | None) -> Artifact | None:
    """The finished artifact of a step, when it is there and still holds what it held."""
    if key is None or not target.path.is_dir():
        return None
    lineage = Lineage.read(target.path)
    if lineage is None or lineage.key != key:
        return None
    artifact = Artifact.open(target.path)
    return artifact if artifact.digest == lineage.digest else None


def _recorded_digests(folder: Target, count: int, recipe: Recipe, *, single: bool) -> dict[str, str]:
    """Key to digest of every step in the final artifact's lineage: intermediates may have been dropped."""
    last = _step_target(folder, count - 1, name_of(recipe.steps[-1].built()), count, single=single)
    lineage = Lineage.read(last.path) if last.path.is_dir() else None
    return {step.key: step.digest for step in lineage.steps[:-1]} if lineage is not None else {}


def _check_machine(steps: tuple[PlannedStep, ...], folder: Target, reporter: Reporter) -> None:
    """Refuse a run that the disk cannot hold; say so where memory looks short."""
    import psutil

    needed = sum(step.needs.disk_bytes for step in steps if step.needs is not None)
    # What an interrupted run has written already need not be written again.
    needed -= sum(_written(step.target.partial) for step in steps if step.needs is not None)
    room = folder.room()
    if needed > room:
        raise EnvironmentFault(
            f"the run needs about {_mebibytes(needed)} of disk, {folder.path.parent} has {_mebibytes(room)}",
            "free some room, or give another --out",
        )
    host = max((step.needs.host_bytes for step in steps if step.needs is not None), default=0)
    free = psutil.virtual_memory().available
    if host > free:
        reporter.message(
            f"warning: the run is predicted to need {_mebibytes(host)} of memory, {_mebibytes(free)} are free"
        )


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _written(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0


# -- running ---------------------------------------------------------------------------------------


def _step(planned: Plan, step: PlannedStep, source: Artifact) -> Artifact:
    """The artifact of one step: what is there, or what is made now."""
    step.target.tidy()
    if step.done:
        present = _present(step.target, step.key)
        # An intermediate that was dropped is not needed: the step after it is done too.
        return present or source
    run_ = replace(planned.run, scratch=step.target.progress)
    circumstances = _step_circumstances(step.method, planned.source, run_)
    key = step_key(source.digest, step.method, circumstances)
    if (present := _present(step.target, key)) is not None and not planned.fresh:
        return present
    if step.needs is None:
        step.method.check(source, run_)
    step.target.claim()
    started = time.time()
    with _locked(planned, step):
        if step.target.begin(key, fresh=planned.fresh):
            planned.reporter.message(f"{step.use}: taking up an interrupted run")
        try:
            _make(planned, step, source, run_, key, circumstances, started)
        except BaseException as error:
            # Nothing worth keeping: an error before the first finished block leaves nothing behind.
            if not any(step.target.progress.glob("unit-*.json")) and isinstance(error, Exception):
                shutil.rmtree(step.target.partial)
            raise
    return Artifact.open(step.target.path)


def _locked(planned: Plan, step: PlannedStep) -> Any:
    from contextlib import nullcontext

    return nullcontext() if step.target.path == planned.folder.path else step.target.lock()


def _make(
    planned: Plan,
    step: PlannedStep,
    source: Artifact,
    run_: Run,
    key: str,
    circumstances: Mapping[str, Any],
    started: float,
) -> None:
    from compress.sweep.verification import verify_weights

    reporter = planned.reporter
    partial = step.target.partial
    try:
        outcome = step.method.apply(source, partial, run_)
        digest = digest_of(partial)
        record = StepRecord(
            step.use, step.method.model_dump(mode="json"), key, digest, dict(circumstances), outcome.decisions
        )
        before = source.lineage.steps if source.lineage is not None else ()
        origin = source.lineage.source_digest if source.lineage is not None else source.digest
        lineage = Lineage(origin, (*before, record), outcome.tensors)
        lineage.write(partial)
        _write_run_file(partial, planned, step, started)
        if outcome.tensors:
            verify_weights(Artifact.open(partial), lineage, run_, source)
    except OSError as error:
        raise EnvironmentFault(
            f"{step.use}: {error.strerror or error} ({error.filename or partial})",
            "finished blocks are kept: put it right and run the same command again",
        ) from error
    reporter.event("artifact.rename", target=str(step.target.path))
    step.target.publish()
    reporter.event("artifact.done", target=str(step.target.path), digest=digest)


def _write_run_file(partial: Path, planned: Plan, step: PlannedStep, started: float) -> None:
    """What may differ between runs that give the same bytes: times, hosts, paths."""
    document = {
        "source": str(planned.source.path),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "libraries": libraries(),
        "code": code_digest(find(step.use)),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 3),
    }
    (partial / RUN_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _measure(planned: Plan, artifacts: list[Path]) -> Any:
    bench = planned.recipe.bench
    if bench is None or planned.recipe.data.eval is None:
        return None
    from compress.bench.experiment import compare

    return compare(
        planned.source.path,
        artifacts,
        planned.folder.path,
        planned.recipe.data.eval,
        task=planned.recipe.task,
        runtimes=bench.runtimes,
        gates=planned.recipe.gates,
        reporter=planned.reporter,
        options=bench.options,
    )
