"""One step of a run: where its artifact lies, what it would compute, and whether that is there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from compress.core.artifact import Artifact, Lineage, digest_of
from compress.core.passes import Pass
from compress.core.run import Run
from compress.core.target import Target
from compress.training.trainer import ORIGIN, Trainer

SOURCE_MODEL = "$model"
"""How a recipe names the model that it starts from, among the options of a step."""


def step_run(method: Pass, source: Artifact, run: Run, scratch: Path) -> Run:
    """The circumstances of one step: where its progress lies, and the folders of the models it names.

    Args:
        source: the model that the recipe starts from.

    Raises:
        ModelError, UsageError, EnvironmentFault: there is no such model, or it cannot be reached.
    """
    from compress.models.source import resolve

    models = {}
    for option in (*method.other_models, ORIGIN) if isinstance(method, Trainer) else ():
        name = getattr(method, option)
        if name is None:
            continue
        models[option] = (
            source.path if name == SOURCE_MODEL else resolve(name, trust_remote_code=run.trust_remote_code)
        )
    return replace(run, scratch=scratch, models=models)


def identified(method: Pass, run: Run) -> Pass:
    """The pass with the folders that it names replaced by what they hold: as it enters key and lineage.

    A teacher that lies in another folder is the same teacher, and one that was changed is another.
    """
    folders = dict(run.models)
    for option in method.other_folders if isinstance(method, Trainer) else ():
        if (named := getattr(method, option)) is not None:
            folders[option] = Path(named).expanduser()
    digests = {option: f"sha256:{digest_of(folder)}" for option, folder in folders.items()}
    return method.model_copy(update=digests) if digests else method


def step_circumstances(method: Pass, source: Artifact, run: Run) -> dict[str, Any]:
    """What of the run can change the bytes of a step, as it is recorded and as it enters the key."""
    circumstances: dict[str, Any] = {"task": run.task, "device": run.device, "threads": run.threads}
    if method.reads_calibration and run.calibration is not None:
        from compress.data.calibration import digest_of_source

        circumstances |= {
            "seed": run.seed,
            "calibration": digest_of_source(run.calibration, source.path, run.seed),
            "samples": run.calibration.samples,
            "sequence_length": run.calibration.sequence_length,
            "batch_size": run.calibration.batch_size,
        }
    if isinstance(method, Trainer) and run.training is not None:
        from compress.data import training
        from compress.training.precision import resolved

        circumstances |= {
            "seed": run.seed,
            "train": training.digest_of_source(run.training),
            "precision": resolved(method.precision, run.device),
        }
    return circumstances


def step_target(folder: Target, index: int, use: str, count: int, *, single: bool) -> Target:
    """Where the artifact of step ``index`` of ``count`` lies: in a folder of the run, or alone."""
    if single and index == count - 1:
        return Target(folder.path, "compress.json")
    above = intermediates(folder) if single else folder.path
    return Target(above / f"{index + 1:02d}-{use}", "compress.json")


def intermediates(folder: Target) -> Path:
    """Where the artifacts before the last lie while a run whose folder is that of the last goes on."""
    return folder.path.with_name(f".{folder.path.name}.steps")


def finished(target: Target, key: str | None) -> Artifact | None:
    """The finished artifact of a step, when it is there and still holds what it held."""
    if key is None or not target.path.is_dir():
        return None
    lineage = Lineage.read(target.path)
    if lineage is None or lineage.key != key:
        return None
    artifact = Artifact.open(target.path)
    return artifact if artifact.digest == lineage.digest else None
