"""One step of a run: where its artifact lies, what it would compute, and whether that is there."""

from typing import Any

from compress.core.artifact import Artifact, Lineage
from compress.core.passes import Pass
from compress.core.run import Run
from compress.core.target import Target


def step_circumstances(method: Pass, source: Artifact, run: Run) -> dict[str, Any]:
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


def step_target(folder: Target, index: int, use: str, count: int, *, single: bool) -> Target:
    """Where the artifact of step ``index`` of ``count`` lies: in a folder of the run, or alone."""
    last = index == count - 1
    path = folder.path if single and last else folder.path / f"{index + 1:02d}-{use}"
    return Target(path, "compress.json")


def finished(target: Target, key: str | None) -> Artifact | None:
    """The finished artifact of a step, when it is there and still holds what it held."""
    if key is None or not target.path.is_dir():
        return None
    lineage = Lineage.read(target.path)
    if lineage is None or lineage.key != key:
        return None
    artifact = Artifact.open(target.path)
    return artifact if artifact.digest == lineage.digest else None
