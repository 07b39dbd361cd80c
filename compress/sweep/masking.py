"""Setting single weights to zero on the streaming sweep, scored by magnitude and input.

Matrices keep their shape and their precision, and are written as the plain floats that they were. As in the
paper (Sun et al. 2023, arXiv 2306.11695, algorithm 1), all matrices of a block are scored on the block as it
was, and the block's output after pruning is what the next block sees.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch

from compress.core.artifact import Artifact
from compress.core.errors import CalibrationError, PlanError
from compress.core.passes import Needs, Outcome
from compress.core.run import Run
from compress.models.blocks import find_blocks
from compress.models.checkpoint import Checkpoint
from compress.models.load import loaded_dtype, skeleton
from compress.numerics.masks import ColumnNorms, pattern_mask, row_mask
from compress.numerics.statistic import Statistic
from compress.sweep.matrices import Matrix, find_matrices
from compress.sweep.prediction import predict_masking
from compress.sweep.selection import beyond_blocks, check_patterns, ignored, unheld
from compress.sweep.sweep import Sweep
from compress.sweep.treatment import Replacement, SeparateTreatment, Treated
from compress.sweep.walk import placed_skeleton
from compress.sweep.zeros import Chosen, Pattern, Zeros


def check(chosen: Chosen, source: Artifact, run: Run) -> Needs:
    """Select what would be pruned, refuse what cannot be, and predict the work.

    Raises:
        PlanError: a matrix that the pattern does not divide, a large weight that is no matrix, or no text.
        UsageError: a pattern of names matches nothing.
    """
    if run.calibration is None:
        raise PlanError("the method needs calibration text", "give --calibration TEXT or data.calibration")
    model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
    checkpoint = Checkpoint(source, model)
    matrices, _ = _select(chosen, model, checkpoint)
    return predict_masking(matrices, find_blocks(model), model, checkpoint, run)


def mask(chosen: Chosen, source: Artifact, target: Path, run: Run) -> Outcome:
    """Prune the selected matrices of a model, block by block, from disk to disk.

    Blocks are computed in float32 on a CPU and in the model's own precision on a GPU.
    """
    device = torch.device(run.device)
    storage = loaded_dtype(source)
    model = placed_skeleton(source, run)
    checkpoint = Checkpoint(source, model)
    matrices, kept = _select(chosen, model, checkpoint)
    on_disk = {name: checkpoint.dtype(name) for name in checkpoint.names}
    treatment = _Masking(storage, on_disk, source.config)
    labels = dict.fromkeys(matrices, chosen.zeros)
    outcome = Sweep(treatment, source, target, run, model, checkpoint, labels, device).apply()
    layers = outcome.decisions["layers"].values()
    weights = sum(int(row["rows"]) * int(row["columns"]) for row in layers)
    zeros = sum(int(row["zeros"]) for row in layers)
    counted = {"weights": weights, "zeros": zeros, "sparsity": zeros / weights}
    return replace(outcome, decisions={**counted, "kept": dict(sorted(kept.items())), **outcome.decisions})


def _select(chosen: Chosen, model: Any, checkpoint: Checkpoint) -> tuple[list[Matrix], dict[str, str]]:
    """The matrices to prune in the order of the model, and what stays whole with the reason."""
    blocks = find_blocks(model)
    kept: dict[str, str] = {}
    matrices: list[Matrix] = []
    for block in blocks:
        found = find_matrices(model, block.name, checkpoint, dense=True)
        kept |= unheld(found, chosen.ignore, "pruning matrix by matrix")
        for matrix in found.matrices:
            if ignored(chosen.ignore, matrix):
                kept[matrix.name] = "ignored"
            else:
                matrices.append(matrix)
    beyond = beyond_blocks(chosen.ignore, chosen.include, model, blocks, checkpoint)
    for matrix in beyond:
        if matrix.kind.endswith("Embedding"):
            raise PlanError(
                f"{matrix.name} looks rows up and multiplies nothing, so its weights cannot be scored",
                "include linear layers alone, such as lm_head",
            )
    matrices += beyond
    names = {matrix.name for matrix in matrices} | set(kept)
    check_patterns({"--ignore": chosen.ignore, "--include": chosen.include}, model, names)
    if not matrices:
        raise PlanError("no matrix is left to prune", "loosen --ignore")
    _check_pattern(chosen.zeros.pattern, matrices)
    return matrices, kept


def _check_pattern(pattern: Pattern | None, matrices: Sequence[Matrix]) -> None:
    for matrix in matrices:
        if pattern is not None and matrix.columns % pattern.of:
            raise PlanError(
                f"{matrix.name} has {matrix.columns} columns, which runs of {pattern.of} do not divide",
                f"leave it whole with --ignore '{matrix.name}', or use --sparsity",
            )


@final
@dataclass(frozen=True)
class _Dense(Replacement):
    """Plain floats.

    Attributes:
        weight: float32 ``[rows, columns]``, every value one of the model's own or zero.
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
class _Masking(SeparateTreatment):
    """Zeros where the scores are lowest, as a treatment; labels are `Zeros`.

    Attributes:
        loaded: the precision in which a loader holds the weights.
        on_disk: the precision of every tensor of the source, in which it is written again.
        config: of the source.
    """

    loaded: torch.dtype
    on_disk: Mapping[str, torch.dtype]
    config: Mapping[str, Any]

    @property
    def calibrated(self) -> bool:
        return True

    def statistic(self, columns: int, device: torch.device) -> Statistic:
        return ColumnNorms(columns, device)

    def treat(self, weight: torch.Tensor, statistic: Statistic | None, label: Hashable) -> Treated:
        if not isinstance(statistic, ColumnNorms):
            raise CalibrationError("weights cannot be scored without their input", "give calibration text")
        if not isinstance(label, Zeros):
            raise TypeError(f"the label of a pruned matrix is Zeros, got {type(label).__name__}")
        scores = weight.abs() * statistic.norms
        pattern = label.pattern
        if pattern is None:
            staying = row_mask(scores, label.sparsity)
        else:
            staying = pattern_mask(scores, pattern.kept, pattern.of)
        weight.masked_fill_(~staying, 0)
        return Treated(_Dense(weight, self.loaded))

    def rebuilt(self, parts: Mapping[str, torch.Tensor], label: Hashable) -> Replacement:
        return _Dense(parts["weight"], self.loaded)

    def encode(
        self, weight: str, parts: Mapping[str, torch.Tensor], label: Hashable
    ) -> dict[str, torch.Tensor]:
        # A head that shared the embedding's weight has no tensor in the source.
        return {weight: parts["weight"].to(self.on_disk.get(weight, self.loaded))}

    def configuration(self) -> dict[str, Any]:
        return dict(self.config)
