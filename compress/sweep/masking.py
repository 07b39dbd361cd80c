"""Setting single weights to zero on the streaming sweep, whichever way they are chosen.

Matrices keep their shape and their precision, and are written as the plain floats that they were; their zeros
are counted in the files. The block's output after pruning is what the next block sees. Whether a matrix sees
what was done to those before it in its own block is the method's to say: Wanda scores all matrices of a block
on the block as it was (Sun et al. 2023, arXiv 2306.11695, algorithm 1).
"""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from safetensors import safe_open

from compress.core.artifact import Artifact
from compress.core.errors import ModelError, PlanError
from compress.core.passes import Needs, Outcome
from compress.core.run import Run
from compress.models.blocks import Block, find_blocks
from compress.models.checkpoint import Checkpoint
from compress.models.load import loaded_dtype, skeleton
from compress.models.tasks import resolve
from compress.numerics.statistic import Statistic
from compress.sweep.masker import Masker
from compress.sweep.matrices import Matrix, find_matrices
from compress.sweep.prediction import predict_masking, predict_whole
from compress.sweep.selection import beyond_blocks, check_patterns, ignored, unheld
from compress.sweep.sensitivity import require_distribution
from compress.sweep.shares import choices, measuring, settle
from compress.sweep.sweep import Sweep
from compress.sweep.treatment import Replacement, Treated, Treatment
from compress.sweep.walk import placed_skeleton
from compress.sweep.zeros import Pattern, Zeros

_READING = 500e6
"""Bytes that a disk gives in a second, for predictions."""


def check(masker: Masker, source: Artifact, run: Run) -> Needs:
    """Select what would be pruned, refuse what cannot be, and predict the work.

    Raises:
        PlanError: a matrix that the pattern does not divide, a large weight that is no matrix, no text, or
            a task without an output distribution where shares follow from sensitivity.
        UsageError: a pattern of names matches nothing.
    """
    if masker.reads_calibration and run.calibration is None:
        what = "the method needs" if masker.calibrated else f"ratios by {masker.ratios} need"
        raise PlanError(f"{what} calibration text", "give --calibration TEXT or data.calibration")
    if masker.ratios == "sensitivity":
        require_distribution(resolve(run.task, source.config))
    model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
    checkpoint = Checkpoint(source, model)
    matrices, _ = _select(masker, model, checkpoint)
    return _predict(masker, matrices, model, checkpoint, run)


def _predict(
    masker: Masker, matrices: Sequence[Matrix], model: Any, checkpoint: Checkpoint, run: Run
) -> Needs:
    """The sweep, and what settles the shares before it."""
    passes = 0.0
    if masker.calibrated:
        # Stage by stage a block runs once more than all at once.
        passes += 3.0 if masker.staged else 2.0
    if masker.ratios == "outliers":
        passes += 2.0
    reading = run if passes else replace(run, calibration=None)
    needs = predict_masking(
        matrices, find_blocks(model), model, checkpoint, reading, passes=passes, products=masker.products
    )
    if masker.ratios == "sensitivity":
        tried = len(choices(masker))
        return predict_whole(needs, matrices, model, checkpoint, measuring(masker, run), tried)
    if not masker.uniform and not masker.reads_calibration:
        # All weights are read twice more.
        return replace(needs, seconds=needs.seconds + 2 * needs.disk_bytes / _READING)
    return needs


def mask(masker: Masker, source: Artifact, target: Path, run: Run) -> Outcome:
    """Prune the selected matrices of a model, block by block, from disk to disk.

    Blocks are computed in float32 on a CPU and in the model's own precision on a GPU.

    Raises:
        CalibrationError: no data reached a matrix, or its statistic is unusable.
        ModelError: a matrix holds NaN or infinite values, or would leave the range of its precision.
    """
    device = torch.device(run.device)
    storage = loaded_dtype(source)
    model = placed_skeleton(source, run)
    checkpoint = Checkpoint(source, model)
    matrices, kept = _select(masker, model, checkpoint)
    shares = settle(masker, matrices, source, run)
    on_disk = {name: checkpoint.dtype(name) for name in checkpoint.names}
    treatment = _Masking(masker, storage, on_disk, source.config)
    labels = {
        matrix: _Label.of(matrix, shares.zeros(masker, matrix), on_disk, storage) for matrix in matrices
    }
    outcome = Sweep(treatment, source, target, run, model, checkpoint, labels, device).apply()
    changed = {name for name, meant in outcome.tensors.items() if meant.changed}
    weights, zeros = _counted(target, changed)
    decisions = {
        "weights": weights,
        "zeros": zeros,
        "sparsity": zeros / weights,
        "kept": dict(sorted(kept.items())),
        **shares.decisions,
        **outcome.decisions,
    }
    if not masker.calibrated:
        # Nothing is gathered, which is not the same as gathered from no token.
        decisions["layers"] = {
            name: {key: value for key, value in row.items() if key != "tokens"}
            for name, row in outcome.decisions["layers"].items()
        }
    return replace(outcome, decisions=decisions)


def _counted(folder: Path, names: Collection[str]) -> tuple[int, int]:
    """How many weights the tensors of these names have as they lie on disk, and how many are zero."""
    weights = zeros = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                if name in names:
                    tensor = handle.get_tensor(name)
                    weights += tensor.numel()
                    zeros += tensor.numel() - int(tensor.count_nonzero())
    return weights, zeros


def _select(masker: Masker, model: Any, checkpoint: Checkpoint) -> tuple[list[Matrix], dict[str, str]]:
    """The matrices to prune in the order of the model, and what stays whole with the reason."""
    blocks = find_blocks(model)
    kept: dict[str, str] = {}
    matrices: list[Matrix] = []
    for block in blocks:
        found = find_matrices(model, block.name, checkpoint, dense=True)
        kept |= unheld(found, masker.ignore, "pruning matrix by matrix")
        for matrix in found.matrices:
            if ignored(masker.ignore, matrix):
                kept[matrix.name] = "ignored"
            else:
                matrices.append(matrix)
    if masker.ratios != "uniform" and not matrices:
        raise PlanError("no matrix inside the blocks is left to share zeros among", "loosen --ignore")
    matrices += _beyond(masker, model, blocks, checkpoint)
    names = {matrix.name for matrix in matrices} | set(kept)
    check_patterns({"--ignore": masker.ignore, "--include": masker.include}, model, names)
    if not matrices:
        raise PlanError("no matrix is left to prune", "loosen --ignore")
    _check_pattern(masker.zeros.pattern, matrices)
    return matrices, kept


def _beyond(masker: Masker, model: Any, blocks: Sequence[Block], checkpoint: Checkpoint) -> list[Matrix]:
    """The linear layers outside the blocks that were asked for."""
    beyond = beyond_blocks(masker.ignore, masker.include, model, blocks, checkpoint)
    for matrix in beyond:
        if matrix.kind.endswith("Embedding"):
            raise PlanError(
                f"{matrix.name} looks rows up and multiplies nothing, so its weights cannot be scored",
                "include linear layers alone, such as lm_head",
            )
    return beyond


def _check_pattern(pattern: Pattern | None, matrices: Sequence[Matrix]) -> None:
    for matrix in matrices:
        if pattern is not None and matrix.columns % pattern.of:
            raise PlanError(
                f"{matrix.name} has {matrix.columns} columns, which runs of {pattern.of} do not divide",
                f"leave it whole with --ignore '{matrix.name}', or use --sparsity",
            )


@final
@dataclass(frozen=True)
class _Label:
    """How one matrix is pruned.

    Attributes:
        zeros: how much of it.
        written: the precision in which it lies on disk, the coarsest where its pieces differ.
        alone: its name where its rows are compared with each other, so that those of no other matrix may be
            stacked with them; else empty.
    """

    zeros: Zeros
    written: torch.dtype
    alone: str

    @classmethod
    def of(
        cls, matrix: Matrix, zeros: Zeros, on_disk: Mapping[str, torch.dtype], storage: torch.dtype
    ) -> "_Label":
        # A head that shared the embedding's weight has no tensor in the source.
        kinds = [on_disk[name] for name in matrix.on_disk] or [storage]
        by_row = zeros.pattern is not None or zeros.among == "row"
        written = max(kinds, key=lambda kind: torch.finfo(kind).eps)
        return cls(zeros, written, "" if by_row else matrix.name)

    def __str__(self) -> str:
        return str(self.zeros)


@final
@dataclass(frozen=True)
class _Dense(Replacement):
    """Plain floats.

    Attributes:
        weight: float32 ``[rows, columns]``, every value one that the precision on disk has.
        loaded: the precision in which a loader holds it.
    """

    weight: torch.Tensor
    loaded: torch.dtype

    def rows(self, start: int, stop: int) -> "_Dense":
        return _Dense(self.weight[start:stop], self.loaded)

    def value(self) -> torch.Tensor:
        return self.weight.to(self.loaded)

    def parts(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight}

    def notes(self) -> Mapping[str, float | int | str]:
        zeros = int((self.weight == 0).sum())
        return {"zeros": zeros, "sparsity": zeros / self.weight.numel()}


@final
@dataclass(frozen=True)
class _Masking(Treatment):
    """Zeros in the place of weights, as a treatment; labels are `_Label`.

    Attributes:
        masker: the method.
        loaded: the precision in which a loader holds the weights.
        on_disk: the precision of every tensor of the source, in which it is written again.
        config: of the source.
    """

    masker: Masker
    loaded: torch.dtype
    on_disk: Mapping[str, torch.dtype]
    config: Mapping[str, Any]

    @property
    def calibrated(self) -> bool:
        return self.masker.calibrated

    @property
    def staged(self) -> bool:
        return self.masker.staged

    @property
    def original(self) -> bool:
        return False

    @property
    def joint(self) -> None:
        return None

    def statistic(self, columns: int, device: torch.device) -> Statistic | None:
        return self.masker.statistic(columns, device)

    def treat(self, weight: torch.Tensor, statistic: Statistic | None, label: Hashable) -> Treated:
        if not isinstance(label, _Label):
            raise TypeError(f"the label of a pruned matrix is a _Label, got {type(label).__name__}")
        pruned = self.masker.prune(weight, statistic, label.zeros)
        # As a reader will find it: a method may have moved what it did not take away.
        written = pruned.weight.to(label.written).float()
        if not bool(torch.isfinite(written).all()):
            kind = str(label.written).removeprefix("torch.")
            raise ModelError(
                f"a pruned matrix holds values that are NaN, infinite or too large for {kind}",
                "restore the model from a sound checkpoint, or convert it to bfloat16 first",
            )
        return Treated(_Dense(written, self.loaded), pruned.notes)

    def rebuilt(self, parts: Mapping[str, torch.Tensor], label: Hashable) -> Replacement:
        return _Dense(parts["weight"], self.loaded)

    def encode(
        self, weight: str, parts: Mapping[str, torch.Tensor], label: Hashable
    ) -> dict[str, torch.Tensor]:
        # A head that shared the embedding's weight has no tensor in the source.
        return {weight: parts["weight"].to(self.on_disk.get(weight, self.loaded))}

    def configuration(self) -> dict[str, Any]:
        return dict(self.config)
