"""Holding an artifact in another engine's format against what was meant, read back by its documentation.

Such an artifact is loaded by kernels that need not be here. What is on disk is therefore read by the layout
that the format documents, apart from the code that wrote it (for GGUF by the format's own package), and every
matrix has to come out with exactly the values that were meant, in float32.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from compress.core.artifact import Artifact, Lineage
from compress.core.errors import ModelError, VerificationError
from compress.core.facts import Fact
from compress.core.run import Run
from compress.formats import gguf
from compress.formats.awq import Awq
from compress.formats.gptq import Gptq
from compress.formats.packed import PackedFormat
from compress.models.checkpoint import Checkpoint
from compress.models.load import skeleton
from compress.numerics.fingerprint import fingerprint

_HINT = "the artifact is damaged or was written wrongly: make it again, and report it if that does not help"
_FORMATS: Mapping[Fact, type[PackedFormat]] = {Fact.GPTQ_CHECKPOINT: Gptq, Fact.AWQ_CHECKPOINT: Awq}
_COMPUTED = frozenset({"rope_freqs.weight"})
"""Tensors of a GGUF file that come from the configuration and not from a weight."""


def is_stored_otherwise(artifact: Artifact) -> bool:
    """Whether an artifact is in a format that stock transformers does not load."""
    return bool(artifact.facts & {*_FORMATS, Fact.GGUF_FILE})


def verify_stored(artifact: Artifact, lineage: Lineage, run: Run) -> None:
    """Read every tensor of the artifact and compare it with what was meant.

    Raises:
        VerificationError: naming the first tensor that is missing, strange, or not what was meant.
    """
    try:
        _compare(artifact, lineage, run)
    except ModelError as error:
        raise VerificationError(f"it does not read back: {error.message}", _HINT) from error


def _compare(artifact: Artifact, lineage: Lineage, run: Run) -> None:
    found = _of_gguf(artifact, lineage) if Fact.GGUF_FILE in artifact.facts else _of_packed(artifact, run)
    seen: set[str] = set()
    with run.reporter.progress("verifying", len(lineage.tensors), "tensor") as advance:
        for name, value in found:
            meant = lineage.tensors.get(name)
            if meant is None:
                raise VerificationError(f"{name} is on disk, and no pass meant to write it", _HINT)
            if fingerprint(value) != meant.digest:
                raise VerificationError(f"{name} reads back with other values than were meant", _HINT)
            seen.add(name)
            advance(1)
    lost = sorted(set(lineage.tensors) - seen)
    if lost:
        raise VerificationError(f"{lost[0]} should be in the artifact, and nothing has its name", _HINT)


def _of_packed(artifact: Artifact, run: Run) -> Iterator[tuple[str, torch.Tensor]]:
    """Float names with values: of matrices in float32, of everything else as it is stored."""
    model = skeleton(artifact, task=run.task, trust_remote_code=run.trust_remote_code)
    checkpoint = Checkpoint(artifact, model)
    config: Mapping[str, Any] = artifact.config["quantization_config"]
    form = next(kind for fact, kind in _FORMATS.items() if fact in artifact.facts)()
    matrices: dict[str, dict[str, str]] = {}
    stems = {name.removesuffix(".qweight") for name in checkpoint.names if name.endswith(".qweight")}
    for name in checkpoint.names:
        stem, _, local = name.rpartition(".")
        if stem in stems and local != "bias":
            matrices.setdefault(stem, {})[local] = name
        else:
            yield name, checkpoint.tensor(name)
    for stem, names in sorted(matrices.items()):
        tensors = {local: checkpoint.tensor(name) for local, name in names.items()}
        yield f"{stem}.weight", form.read(tensors, _module(stem, checkpoint), config).value()


def _module(stem: str, checkpoint: Checkpoint) -> str:
    """The module's name, by which rules of a configuration speak of it."""
    return checkpoint.target[f"{stem}.qweight"].removesuffix(".qweight")


def _of_gguf(artifact: Artifact, lineage: Lineage) -> Iterator[tuple[str, torch.Tensor]]:
    """Names of transformers with values in float32, rows in the order of transformers."""
    file = gguf.File(artifact.path / gguf.FILE)
    names = gguf.Names(file.architecture, int(file.field(f"{file.architecture}.block_count")))
    ours = {names.of(name): name for name in lineage.tensors}
    for tensor in file.tensors():
        if tensor.name not in _COMPUTED:
            yield ours.get(tensor.name, tensor.name), tensor.value
