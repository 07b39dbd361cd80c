"""Looking at an artifact: what it holds, and whether that is what was made."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.core.artifact import Artifact
from compress.core.errors import ModelError, VerificationError
from compress.core.events import SILENT, Reporter
from compress.core.run import Run
from compress.engine.serving import vllm_document

if TYPE_CHECKING:
    from compress.sweep.verification import Verified


@dataclass(frozen=True)
class VerificationReport:
    """What `verify` held true of an artifact."""

    path: Path
    digest: str
    weights: "Verified | None"


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
    """What a folder holds, from its headers: facts, architecture, sizes, what vLLM asks, lineage."""
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
    served = vllm_document(artifact)
    if served is not None:
        document["vllm"] = served
    if artifact.lineage is not None:
        document["lineage"] = [
            {"use": step.use, "options": dict(step.options), "key": step.key, "digest": step.digest}
            for step in artifact.lineage.steps
        ]
    return document
