"""Which share of its weights each matrix loses, settled before the sweep that prunes.

Three ways, each with the mean that was asked for. By *outliers*: one pass over the model as it was, block by
block, in which every block gets a share of its own (`compress.numerics.shares`). By *sensitivity*: every part
is pruned alone, to several shares, the divergence of the model's output is measured, and the shares with the
least sum of divergences are taken (`compress.sweep.sensitivity`, `compress.numerics.allocation`). By
*magnitude*: one threshold for all matrices together (`compress.numerics.magnitudes`).

What was settled is kept in the scratch folder, for a run that is taken up again.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, final

import torch

from compress.core.artifact import Artifact
from compress.core.errors import CalibrationError, PlanError
from compress.core.run import RESUMABLE, Run
from compress.models.blocks import Block, Reentry
from compress.models.checkpoint import Checkpoint
from compress.numerics.allocation import Option, allocate
from compress.numerics.magnitudes import smallest_magnitudes
from compress.numerics.masks import ColumnNorms, whole
from compress.numerics.shares import outlier_share, shares_around, shares_by_outliers
from compress.numerics.statistic import Statistic
from compress.sweep.activations import Activations
from compress.sweep.gathering import gathered
from compress.sweep.masker import USUAL_OUTLIER_FACTOR, USUAL_SPREAD, Masker
from compress.sweep.matrices import Matrix
from compress.sweep.memory import return_freed
from compress.sweep.scores import staying
from compress.sweep.sensitivity import Sensitivity, Trial, measure_trial
from compress.sweep.walk import Walk, placed_skeleton
from compress.sweep.zeros import Zeros

GRID: Final = 1_000_000
"""Parts of a whole in which shares are chosen."""
STEPS: Final = 2
"""Shares to choose among on each side of the mean."""
_NEARLY_EVERYTHING: Final = 0.99


@dataclass(frozen=True)
class Shares:
    """What each matrix loses.

    Attributes:
        by_matrix: a share by name of the matrix; of the others it is the one that was asked for.
        decisions: how they came about, for the lineage.
    """

    by_matrix: Mapping[str, float] = field(default_factory=dict)
    decisions: Mapping[str, Any] = field(default_factory=dict)

    def zeros(self, masker: Masker, matrix: Matrix) -> Zeros:
        """How much of one matrix goes."""
        usual = masker.zeros
        share = self.by_matrix.get(matrix.name)
        return usual if share is None else replace(usual, sparsity=share)


def settle(masker: Masker, matrices: Sequence[Matrix], source: Artifact, run: Run) -> Shares:
    """The share of every matrix that is to be pruned.

    Args:
        matrices: in the order of the model.
        source: the artifact that is read.
        run: with calibration text where the method reads it.

    Raises:
        CalibrationError: no data reached a matrix, its inputs or the model's output are not finite.
        PlanError: calibration text is missing, or the task has no output distribution to be sensitive.
    """
    if masker.uniform:
        return Shares()
    file = run.scratch / "shares.json"
    found = _read(file)
    if found is None:
        if masker.among == "model":
            found = _by_magnitude(masker, matrices, source, run)
        elif masker.ratios == "outliers":
            found = _by_outliers(masker, matrices, source, run)
        else:
            found = _by_sensitivity(masker, matrices, source, run)
        _keep(file, found)
    lowest, highest = min(found.by_matrix.values()), max(found.by_matrix.values())
    run.reporter.message(f"shares of zeros: {lowest:.4g} to {highest:.4g} by layer")
    _warn(found, run)
    return found


def measuring(masker: Masker, run: Run) -> Run:
    """A run whose calibration text is at most what sensitivity is measured on."""
    if run.calibration is None:
        return run
    fewer = min(masker.measured_samples, run.calibration.samples)
    return replace(run, calibration=replace(run.calibration, samples=fewer))


def choices(masker: Masker) -> tuple[int, ...]:
    """The shares that a part may get by its sensitivity, in parts of `GRID`."""
    return shares_around(masker.zeros.sparsity, _spread(masker), STEPS, GRID)


def _spread(masker: Masker) -> float:
    return USUAL_SPREAD if masker.spread is None else masker.spread


def _warn(found: Shares, run: Run) -> None:
    """Say it where a matrix loses all of its weights, or nearly."""
    empty = [name for name, share in found.by_matrix.items() if share > _NEARLY_EVERYTHING]
    if empty:
        run.reporter.message(
            f"warning: {len(empty)} matrices lose more than {_NEARLY_EVERYTHING:.0%} of their weights, "
            f"first {empty[0]}; leave them whole with --ignore"
        )


# -- kept from an interrupted run ----------------------------------------------------------------------


def _keep(file: Path, found: Shares) -> None:
    """Write what was settled, complete or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(found)), encoding="utf-8")
    partial.replace(file)
    (file.parent / RESUMABLE).touch()


def _read(file: Path) -> Shares | None:
    if not file.is_file():
        return None
    return Shares(**json.loads(file.read_text(encoding="utf-8")))


# -- by magnitude --------------------------------------------------------------------------------------


def _by_magnitude(masker: Masker, matrices: Sequence[Matrix], source: Artifact, run: Run) -> Shares:
    """One threshold for all matrices."""
    sizes = [matrix.rows * matrix.columns for matrix in matrices]
    gone = whole(sum(sizes), masker.zeros.sparsity)
    found = smallest_magnitudes(_weights(matrices, source, run), gone)
    shares = {matrix.name: number / size for matrix, number, size in zip(matrices, found, sizes, strict=True)}
    return Shares(shares)


def _weights(matrices: Sequence[Matrix], source: Artifact, run: Run) -> Callable[[], Iterator[torch.Tensor]]:
    """Brings all matrices one after the other, a block in memory at a time."""
    walk = _walk(source, run)
    places = [
        [matrix for matrix in matrices if matrix.parameter.startswith(f"{block.name}.")]
        for block in walk.blocks
    ]
    inside = {matrix for place in places for matrix in place}
    beyond = [matrix for matrix in matrices if matrix not in inside]
    if beyond:
        walk.load_outside()
        walk.load_head()

    def bring() -> Iterator[torch.Tensor]:
        with run.reporter.progress("looking at all weights", len(walk.blocks), "block") as advance:
            for block, place in zip(walk.blocks, places, strict=True):
                if place:
                    walk.checkpoint.load_module(block.name, walk.device)
                    yield from (_view(walk, matrix) for matrix in place)
                    walk.checkpoint.release(block.name)
                    return_freed()
                advance(1)
        yield from (_view(walk, matrix) for matrix in beyond)

    return bring


def _view(walk: Walk, matrix: Matrix) -> torch.Tensor:
    return matrix.of(walk.model.get_parameter(matrix.parameter).detach())


def _walk(source: Artifact, run: Run) -> Walk:
    """The model as it was, apart from the one that will be pruned."""
    model = placed_skeleton(source, run)
    return Walk(source, run.scratch, run, model, Checkpoint(source, model), torch.device(run.device))


# -- by outliers ---------------------------------------------------------------------------------------


def _by_outliers(masker: Masker, matrices: Sequence[Matrix], source: Artifact, run: Run) -> Shares:
    """A share for each block, the less the more outliers it has."""
    walk = _walk(source, run)
    activations = walk.calibration()
    if activations is None:
        raise PlanError("outliers are found on calibration text", "give --calibration TEXT")
    factor = USUAL_OUTLIER_FACTOR if masker.outlier_factor is None else masker.outlier_factor
    members: dict[str, list[Matrix]] = {}
    outliers: dict[str, float] = {}
    walk.begin()
    with (
        walk.reentry() as reentry,
        run.reporter.progress(f"outliers of {len(walk.blocks)} blocks", len(walk.blocks), "block") as advance,
    ):
        walk.load_outside()
        for block in walk.blocks:
            inside = [matrix for matrix in matrices if matrix.parameter.startswith(f"{block.name}.")]
            walk.checkpoint.load_module(block.name, walk.device)
            if inside:
                members[block.name] = inside
                outliers[block.name] = _outliers(inside, block, walk, reentry, activations, factor)
            for batch, recording in zip(activations.batches, activations.recordings, strict=True):
                reentry.advance(block.position, batch, recording)
            walk.checkpoint.release(block.name)
            return_freed()
            advance(1)
    sizes = [sum(matrix.rows * matrix.columns for matrix in members[block]) for block in outliers]
    found = shares_by_outliers(list(outliers.values()), sizes, masker.zeros.sparsity, _spread(masker))
    shares = {
        matrix.name: share for block, share in zip(outliers, found, strict=True) for matrix in members[block]
    }
    decided = {
        block: {"outliers": float(f"{outliers[block]:.6g}"), "sparsity": float(f"{share:.6g}")}
        for block, share in zip(outliers, found, strict=True)
    }
    return Shares(shares, {"ratios": decided})


def _outliers(
    matrices: Sequence[Matrix],
    block: Block,
    walk: Walk,
    reentry: Reentry,
    activations: Activations,
    factor: float,
) -> float:
    """The share of outliers in one block, which is in memory as it was."""

    def new(columns: int) -> ColumnNorms:
        return ColumnNorms(columns, walk.device)

    scored: list[tuple[torch.Tensor, torch.Tensor]] = []
    for stage in gathered(walk.model, matrices, block, reentry, activations, new):
        for shared in stage:
            norms = _norms(shared.statistic, shared.matrices[0])
            scored += [(_view(walk, matrix), norms) for matrix in shared.matrices]
    return outlier_share(scored, factor)


def _norms(statistic: Statistic | None, matrix: Matrix) -> torch.Tensor:
    if not isinstance(statistic, ColumnNorms):
        raise TypeError(f"norms were gathered for {matrix.name}, got {type(statistic).__name__}")
    try:
        return statistic.norms
    except CalibrationError as error:
        raise CalibrationError(f"{matrix.name}: {error.message}", error.hint) from error


# -- by sensitivity ------------------------------------------------------------------------------------


@final
class _Removal(Trial):
    """Zeros by scores, as a trial; degrees are shares in parts of `GRID`."""

    def __init__(self, masker: Masker, device: torch.device) -> None:
        super().__init__(choices(masker))
        self._masker, self._device = masker, device

    @property
    def statistic(self) -> Callable[[int], Statistic] | None:
        return self._new if self._masker.scored_by_input else None

    def _new(self, columns: int) -> ColumnNorms:
        return ColumnNorms(columns, self._device)

    def changed(
        self, matrix: Matrix, weight: torch.Tensor, statistic: Statistic | None, degree: int
    ) -> torch.Tensor:
        scores = weight.float().abs()
        # An expert that saw nothing of this text changes nothing here, whatever it loses.
        if isinstance(statistic, ColumnNorms) and statistic.tokens:
            scores *= _norms(statistic, matrix)
        zeros = replace(self._masker.zeros, sparsity=degree / GRID)
        return weight.masked_fill(~staying(scores, zeros), 0)


def _by_sensitivity(masker: Masker, matrices: Sequence[Matrix], source: Artifact, run: Run) -> Shares:
    """A share for each part, so that the divergences of all parts together are least."""
    walk = _walk(source, run)
    inside = {
        block.position: [matrix for matrix in matrices if matrix.parameter.startswith(f"{block.name}.")]
        for block in walk.blocks
    }
    trial = _Removal(masker, walk.device)
    parts = measure_trial(source, walk.model, walk.checkpoint, inside, trial, measuring(masker, run))
    # Less than nothing is rounding of the measurement.
    table = [
        [Option(part.weights * (GRID - share), max(part.divergence[share], 0.0)) for share in trial.degrees]
        for part in parts
    ]
    weights = sum(part.weights for part in parts)
    # The mean itself is one of the shares, so there is always a choice.
    chosen = allocate(table, weights * (GRID - round(masker.zeros.sparsity * GRID)))
    taken = [trial.degrees[index] for index in chosen]
    shares = {name: share / GRID for part, share in zip(parts, taken, strict=True) for name in part.part}
    return Shares(shares, {"ratios": _decided(parts, taken)})


def _decided(parts: Sequence[Sensitivity], taken: Sequence[int]) -> dict[str, Any]:
    """What was measured and chosen, by part."""
    return {
        " ".join(part.part): {
            "sparsity": share / GRID,
            "divergence": {
                f"{degree / GRID:.6g}": float(f"{value:.6g}") for degree, value in part.divergence.items()
            },
        }
        for part, share in zip(parts, taken, strict=True)
    }
