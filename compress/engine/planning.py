"""Planning: everything that can be known before work starts, and the refusal of what cannot work.

A plan is made before anything is written: it looks at the model, walks the chain of facts, asks each pass
for what it needs, and compares that with the machine.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.bench.host import free_bytes
from compress.core.artifact import Artifact, Lineage
from compress.core.budget import bytes_of
from compress.core.errors import EnvironmentFault, PlanError
from compress.core.events import SILENT, Reporter
from compress.core.facts import MEANING, Fact
from compress.core.identity import step_key
from compress.core.passes import Expanding, Needs, Outcome, Pass, name_of
from compress.core.recipe import Recipe, Step
from compress.core.run import CalibrationSource, Device, Run, TrainingSource
from compress.core.target import Target
from compress.engine.steps import finished, identified, step_circumstances, step_run, step_target
from compress.training.trainer import Trainer

PLAN_FILE = "compress.plan.json"
RUNS_FOLDER = Path("runs")

Apply = Callable[[Pass, Artifact, Path, Run], Outcome]
"""How a pass is applied to a source, into a folder, under circumstances."""


def alone(method: Pass, source: Artifact, target: Path, run: Run) -> Outcome:
    """A pass applied by this process."""
    return method.apply(source, target, run)


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
        apply: by whom passes are applied: by this process, or by all of a launcher.
    """

    recipe: Recipe
    source: Artifact
    steps: tuple[PlannedStep, ...]
    folder: Target
    single: bool
    run: Run
    reporter: Reporter
    fresh: bool
    apply: Apply = alone

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
                    "spilled_bytes": step.needs.spilled_bytes,
                }
            rows.append(row)
        return rows


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
    given, recipe = recipe, expanded(recipe)
    _check_chain(recipe, source)
    folder = Target(out or RUNS_FOLDER / source.path.resolve().name, "compress.json" if single else PLAN_FILE)
    folder.claim()
    run = _circumstances(recipe, reporter)
    _check_texts(recipe, source, run)
    _check_bench(recipe, source)
    examine(
        source,
        trust_remote_code=recipe.trust_remote_code,
        task=recipe.task,
        reporter=reporter,
        needs_tokenizer=_needs_tokenizer(run),
    )
    _check_other_models(recipe, source, run)
    steps = _planned(recipe, source, folder, run, single=single, fresh=fresh)
    if not steps[0].done:
        _check_parts(given, source, run)
    _check_machine(steps, folder, reporter)
    return Plan(given, source, steps, folder, single, run, reporter, fresh)


def examined(recipe: Recipe, reporter: Reporter = SILENT) -> tuple[Artifact, Run]:
    """The model of a recipe and its circumstances, looked over as for a plan, for what writes no artifact.

    Raises:
        CompressError: of the kind that fits.
    """
    from compress.models.preflight import examine
    from compress.models.source import resolve

    source = Artifact.open(resolve(recipe.model, trust_remote_code=recipe.trust_remote_code))
    _check_chain(recipe, source)
    run = _circumstances(recipe, reporter)
    _check_texts(recipe, source, run)
    examine(
        source,
        trust_remote_code=recipe.trust_remote_code,
        task=recipe.task,
        reporter=reporter,
        needs_tokenizer=_needs_tokenizer(run),
    )
    return source, run


def expanded(recipe: Recipe) -> Recipe:
    """The recipe with every pass that stands for others replaced by them.

    Raises:
        UsageError: options of such a pass do not fit the ones that it stands for.
    """
    steps: list[Step] = []
    for step in recipe.steps:
        method = step.built()
        steps += map(Step.of, method.expand()) if isinstance(method, Expanding) else [step]
    return recipe.model_copy(update={"steps": tuple(steps)})


def _check_chain(recipe: Recipe, source: Artifact) -> None:
    """Walk the chain of facts: what each step needs must be true when it is its turn."""
    facts = set(source.facts)
    broken_by: dict[Fact, str] = {}
    for index, step in enumerate(recipe.steps):
        method = step.built()
        missing = sorted(method.needs - facts)[:1]
        if not missing and method.needs_one_of.isdisjoint(facts):
            missing = sorted(method.needs_one_of)
        if missing:
            culprit = next((broken_by[fact] for fact in missing if fact in broken_by), None)
            wanted = " or ".join(MEANING[fact] for fact in missing)
            where = f"step {index} ({step.use}) needs {wanted}"
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
    training = TrainingSource(data.train, data.validation) if data.train is not None else None
    return Run(
        task=recipe.task,
        seed=recipe.seed,
        device=device_of(recipe.device),
        threads=recipe.threads or os.cpu_count() or 1,
        calibration=calibration,
        activations_memory=_activations_memory(recipe.data.activations_memory),
        training=training,
        log=recipe.log,
        trust_remote_code=recipe.trust_remote_code,
        reporter=reporter,
    )


def _activations_memory(asked: str | None) -> int:
    """Bytes of activations that may stay in memory: as asked, or half of what is free."""
    return bytes_of(asked) if asked is not None else free_bytes() // 2


def device_of(asked: str) -> Device:
    """The device that a recipe or a flag means on this machine.

    Raises:
        EnvironmentFault: a GPU is asked for, and there is none.
    """
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
    _check_training(recipe, run)
    if recipe.bench is not None:
        if recipe.data.eval is None:
            raise PlanError("the recipe has a bench and no text to measure on", "set data.eval")
        corpora.check(recipe.data.eval)


def _check_training(recipe: Recipe, run: Run) -> None:
    """Refuse now what a step far down the recipe would refuse when it is its turn."""
    from compress.data import training
    from compress.training.log import require

    trains = [index for index, step in enumerate(recipe.steps) if isinstance(step.built(), Trainer)]
    if trains and run.training is None:
        raise PlanError(
            f"step {trains[0]} ({recipe.steps[trains[0]].use}) needs training text",
            "give --train TEXT or data.train",
        )
    if recipe.log is not None and not trains:
        raise PlanError("the recipe has a log of training and no step that trains", "leave log out")
    require(recipe.log)
    if run.training is not None:
        training.check(run.training)
    elif recipe.data.validation is not None:
        raise PlanError("the recipe has a validation text and no training text", "set data.train")


def _check_other_models(recipe: Recipe, source: Artifact, run: Run) -> None:
    """Look over the models that steps name beside the source, as the source itself is looked over."""
    from compress.models.preflight import examine

    for step in recipe.steps:
        for folder in step_run(step.built(), source, run, run.scratch).models.values():
            if folder != source.path:
                examine(Artifact.open(folder), trust_remote_code=run.trust_remote_code, reporter=run.reporter)


def _needs_tokenizer(run: Run) -> bool:
    from compress.data import training

    text = run.calibration.text if run.calibration is not None else None
    if text is not None and not text.endswith(".safetensors"):
        return True
    return run.training is not None and training.needs_tokenizer(run.training)


def _check_bench(recipe: Recipe, source: Artifact) -> None:
    """Refuse now what the benchmark would refuse after hours of compressing."""
    experiment = recipe.experiment
    if experiment is None:
        return
    from compress import runtimes
    from compress.bench.metrics import metrics_of, quantities
    from compress.core.gate import check_metrics
    from compress.models.tasks import resolve

    for name in experiment.runtimes:
        runtimes.find(name)
    metrics = metrics_of(resolve(recipe.task, source.config), experiment)
    check_metrics(recipe.gates, quantities(metrics))


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
        target = step_target(folder, index, use, len(methods), single=single)
        run_ = step_run(method, source, run, target.progress)
        key = None
        if parent_digest is not None:
            key = step_key(parent_digest, identified(method, run_), step_circumstances(method, source, run_))
        present = finished(target, key)
        done = not fresh and (present is not None or (key is not None and key in recorded))
        needs = None
        if parent is not None and not done:
            needs = method.check(parent, run_).within(run.activations_memory)
        steps.append(PlannedStep(use, method, target, key, done, needs))
        parent = present if done else None
        parent_digest = (present.digest if present else recorded.get(key or "")) if done else None
    return tuple(steps)


def _check_parts(recipe: Recipe, source: Artifact, run: Run) -> None:
    """Refuse now what the later ones of the passes that the first step stands for would refuse in their turn.

    What they will be given is like the source (`Expanding.expand`). Their needs stay open until it is there.
    """
    method = recipe.steps[0].built()
    if isinstance(method, Expanding):
        for part in method.expand()[1:]:
            part.check(source, step_run(part, source, run, run.scratch))


def _recorded_digests(folder: Target, count: int, recipe: Recipe, *, single: bool) -> dict[str, str]:
    """Key to digest of every step in the final artifact's lineage: intermediates may have been dropped."""
    last = step_target(folder, count - 1, name_of(recipe.steps[-1].built()), count, single=single)
    lineage = Lineage.read(last.path) if last.path.is_dir() else None
    return {step.key: step.digest for step in lineage.steps[:-1]} if lineage is not None else {}


def _check_machine(steps: tuple[PlannedStep, ...], folder: Target, reporter: Reporter) -> None:
    """Refuse a run that the disk cannot hold; say so where memory looks short."""
    needed = sum(step.needs.disk_bytes for step in steps if step.needs is not None)
    # What an interrupted run has written already need not be written again.
    needed -= sum(_written(step.target.partial) for step in steps if step.needs is not None)
    room = folder.room()
    if needed > room:
        raise EnvironmentFault(
            f"the run needs about {_mebibytes(needed)} of disk, {folder.path.parent} has {_mebibytes(room)}",
            "free some room, or give another --out",
        )
    for step in steps:
        if step.needs is not None and step.needs.spilled_bytes:
            kept, beyond = map(_mebibytes, (step.needs.activation_bytes, step.needs.spilled_bytes))
            reporter.message(
                f"{step.use}: {kept} of calibration activations stay in memory (--activations-memory), "
                f"{beyond} lie on disk"
            )
    host = max((step.needs.host_bytes for step in steps if step.needs is not None), default=0)
    free = free_bytes()
    if host > free:
        reporter.message(
            f"warning: the run is predicted to need {_mebibytes(host)} of memory, {_mebibytes(free)} are free"
        )


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _written(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
