"""Execution: what is not there yet is made, verified and published, and then measured.

Running a plan redoes only what is missing, down to the block.
"""

import json
import platform
import shutil
import socket
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.core.artifact import RUN_FILE, Artifact, Lineage, StepRecord, digest_of
from compress.core.errors import CompressError, EnvironmentFault
from compress.core.events import SILENT, Reporter
from compress.core.identity import code_digest, libraries, step_key
from compress.core.launch import launch, require_alone
from compress.core.passes import find
from compress.core.recipe import Recipe
from compress.core.run import RESUMABLE, Run
from compress.engine.planning import PLAN_FILE, Plan, PlannedStep, alone, plan
from compress.engine.steps import finished, identified, intermediates, step_circumstances, step_run
from compress.engine.team import Team, check
from compress.training.trainer import Trainer


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


def execute(planned: Plan) -> RunResult:
    """Do what is not done yet, measure, and judge.

    Raises:
        CompressError: of the kind that fits; finished steps and blocks are kept for the next run.
    """
    import torch

    if planned.apply is alone:
        require_alone("compress.engine.execute")
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
        if planned.recipe.keep == "last" or planned.single:
            for path in artifacts[:-1]:
                shutil.rmtree(path)
            artifacts = artifacts[-1:]
        if planned.single and intermediates(planned.folder).is_dir():
            shutil.rmtree(intermediates(planned.folder))
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

    Under a launcher of several processes the first of them does so, and speaks; the others help it train,
    and return when it is done, with what it left behind and without the results of a benchmark.

    Args:
        recipe: a recipe, its plain data, or the path of a YAML file.

    Raises:
        CompressError: of the kind that fits. What goes wrong in the first process alone is raised there;
            in the others it is an exit code.
    """
    if isinstance(recipe, str | Path):
        recipe = Recipe.load(Path(recipe))
    elif not isinstance(recipe, Recipe):
        recipe = Recipe.of(recipe)
    here = launch()
    if here.count == 1:
        return execute(plan(recipe, out, reporter=reporter, fresh=fresh, single=single))
    check(recipe)
    team = Team(here)
    if not here.leads:
        said = team.help()
        artifacts = [Path(path) for path in said["artifacts"]]
        return RunResult(artifacts, Path(said["final"]), None, said["exit_code"], said["did_nothing"])
    said = {"artifacts": [], "final": "", "exit_code": CompressError.exit_code, "did_nothing": False}
    try:
        planned = plan(recipe, out, reporter=reporter, fresh=fresh, single=single)
        result = execute(replace(planned, apply=team.apply))
        said |= {"artifacts": [str(path) for path in result.artifacts], "final": str(result.final)}
        said |= {"exit_code": result.exit_code, "did_nothing": result.did_nothing}
    except CompressError as error:
        said["exit_code"] = error.exit_code
        raise
    finally:
        team.release(said)
    return result


def _step(planned: Plan, step: PlannedStep, source: Artifact) -> Artifact:
    """The artifact of one step: what is there, or what is made now."""
    step.target.tidy()
    if step.done:
        present = finished(step.target, step.key)
        # An intermediate that was dropped is not needed: the step after it is done too.
        return present or source
    run_ = step_run(step.method, planned.source, planned.run, step.target.progress)
    run_ = replace(run_, log_folder=_log_folder(planned, step))
    circumstances = step_circumstances(step.method, planned.source, run_)
    key = step_key(source.digest, identified(step.method, run_), circumstances)
    if (present := finished(step.target, key)) is not None and not planned.fresh:
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
            # Nothing worth keeping: an error before the first finished block or checkpoint leaves nothing.
            if not _resumable(step.target.progress) and isinstance(error, Exception):
                shutil.rmtree(step.target.partial)
            raise
    return Artifact.open(step.target.path)


def _log_folder(planned: Plan, step: PlannedStep) -> Path:
    """Beside the folder of the run: it is written before the result is there, and is no part of it."""
    path = planned.folder.path
    return path.with_name(f"{path.name}.{planned.run.log}") / step.target.path.name


def _resumable(progress: Path) -> bool:
    return (progress / RESUMABLE).is_file() or any(progress.glob("unit-*.json"))


def _locked(planned: Plan, step: PlannedStep) -> Any:
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
        outcome = planned.apply(step.method, source, partial, run_)
        digest = digest_of(partial)
        options = identified(step.method, run_).model_dump(mode="json")
        around = dict(circumstances)
        if isinstance(step.method, Trainer) and (processes := launch().count) > 1:
            # Not part of the key: a training goes on in another number of them, and means the same.
            around["processes"] = processes
        record = StepRecord(step.use, options, key, digest, around, outcome.decisions)
        before = source.lineage.steps if source.lineage is not None else ()
        origin = source.lineage.source_digest if source.lineage is not None else source.digest
        lineage = Lineage(origin, (*before, record), outcome.tensors)
        lineage.write(partial)
        _write_run_file(partial, planned, step, run_, started)
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


def _write_run_file(partial: Path, planned: Plan, step: PlannedStep, run_: Run, started: float) -> None:
    """What may differ between runs that give the same bytes: times, hosts, paths."""
    document = {
        "source": str(planned.source.path),
        **{option: str(folder) for option, folder in run_.models.items()},
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
    experiment = planned.recipe.experiment
    if experiment is None or planned.recipe.data.eval is None:
        return None
    from compress.bench.experiment import compare

    return compare(
        planned.source.path,
        artifacts,
        planned.folder.path,
        planned.recipe.data.eval,
        task=planned.recipe.task,
        gates=planned.recipe.gates,
        reporter=planned.reporter,
        options=experiment,
    )
