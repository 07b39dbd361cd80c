"""How much a model's output changes when one part of it alone is compressed, for each part and degree.

A *part* is what is treated alike: the matrices of a block that read one input (query, key and value; gate and
up), which servers fuse into one, and the experts of a block. Each is changed as a *trial* says, to each of
several degrees; the output distribution is compared with that of the untouched model (Kullback-Leibler
divergence in nats a position), and the part is put back. Rounding is the trial of this file: to nearest on
the grid of least squared error, with a number of bits for a degree.

Losses of several parts nearly add up while they are small, so they show where bits are worth most (Dong et
al. 2019, "HAWQ", arXiv 1905.03696, where curvature stands for what is measured here).

Blocks before the part are not run again: the model is re-entered at its block. All other blocks run for every
measurement, so the whole model is in memory, in the precision in which blocks are computed.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import torch

from compress.core.artifact import Artifact
from compress.core.errors import CalibrationError, PlanError
from compress.core.run import RESUMABLE, Run
from compress.core.scheme import Scheme
from compress.models.blocks import Block, Reentry
from compress.models.checkpoint import Checkpoint
from compress.models.load import loaded_dtype
from compress.models.tasks import FeatureExtraction, Task, resolve
from compress.numerics.affine import ClipSearch, round_to_nearest
from compress.numerics.criterion import Criterion
from compress.numerics.divergence import imitation
from compress.numerics.statistic import Statistic
from compress.sweep.activations import Activations
from compress.sweep.gathering import gathered
from compress.sweep.matrices import Matrix
from compress.sweep.selection import Selection
from compress.sweep.walk import Walk

EXPERTS: Final = "experts"
"""The tie of all experts."""
_COMPARED: Final = 1 << 26
"""Probabilities of the untouched model that are held for comparison, float32; positions are spread over the
text so that they fit."""


@dataclass(frozen=True)
class Sensitivity:
    """What compressing one part alone does.

    Attributes:
        part: names of its matrices.
        tie: parts with the same tie get the same number of bits; the name of the part itself, or what all
            experts share, because readers unpack them with one scheme.
        weights: how many weights it has.
        divergence: by degree (a number of bits), nats a position between the model as it was and with the
            part changed.
    """

    part: tuple[str, ...]
    tie: str
    weights: int
    divergence: Mapping[int, float]


def measure(
    source: Artifact, model: Any, checkpoint: Checkpoint, selection: Selection, bits: Sequence[int], run: Run
) -> list[Sensitivity]:
    """Round every part of a selection alone, to each number of bits, and compare the model's output.

    Finished parts are kept in ``run.scratch`` and not measured again.

    Args:
        source: the artifact that is read.
        model: a skeleton of its model, in the precision in which it is to be computed.
        checkpoint: of the source beside the skeleton.
        selection: what may be rounded; groups and symmetry are taken from its schemes, bits are not.
        bits: numbers to try.
        run: with calibration text.

    Raises:
        CalibrationError: the model's output on the text is not finite.
        PlanError: matrices outside the blocks were selected, or the run has no calibration text.
    """
    if selection.beyond:
        named = ", ".join(matrix.name for matrix in selection.beyond)
        raise PlanError(f"only parts inside the blocks are measured, got {named}", "do not include them")
    trial = _Rounding(bits, selection.schemes, loaded_dtype(source))
    inside = {position: tuple(schemes) for position, schemes in selection.inside.items()}
    return measure_trial(source, model, checkpoint, inside, trial, run)


class Trial(ABC):
    """What is done to one part alone, to several degrees.

    Args:
        degrees: whole numbers, by which the divergences are known.
    """

    def __init__(self, degrees: Sequence[int]) -> None:
        self.degrees = tuple(sorted(set(degrees)))

    @property
    @abstractmethod
    def statistic(self) -> Callable[[int], Statistic] | None:
        """Makes an accumulator for an input of so many columns; ``None`` where inputs are not looked at."""

    @abstractmethod
    def changed(
        self, matrix: Matrix, weight: torch.Tensor, statistic: Statistic | None, degree: int
    ) -> torch.Tensor:
        """Another matrix in the place of one, ``[rows, columns]``, which is not to be overwritten."""


def measure_trial(
    source: Artifact,
    model: Any,
    checkpoint: Checkpoint,
    inside: Mapping[int, Sequence[Matrix]],
    trial: Trial,
    run: Run,
) -> list[Sensitivity]:
    """Change every part alone, to each degree, and compare the model's output.

    Finished parts are kept in ``run.scratch`` and not measured again.

    Args:
        source: the artifact that is read.
        model: a skeleton of its model, in the precision in which it is to be computed.
        checkpoint: of the source beside the skeleton.
        inside: matrices by the position of their block.
        trial: what is done to them.
        run: with calibration text.

    Raises:
        CalibrationError: the model's output on the text is not finite.
        PlanError: the run has no calibration text, or the task has no output distribution.
    """
    return _Measurement(source, model, checkpoint, inside, trial, run).all()


def require_distribution(task: Task) -> None:
    """Refuse a task whose outputs are no distribution.

    Raises:
        PlanError: naming the task.
    """
    if isinstance(task, FeatureExtraction):
        raise PlanError(
            f"sensitivity is a divergence of output distributions, and a model for {task.name} has none",
            "measure the model with the head of its task (--task), or treat all layers alike",
        )


_Part = tuple[tuple[Matrix, Statistic | None], ...]
"""Matrices that are changed together, each with the statistic of its input."""


@final
class _Rounding(Trial):
    """Rounding to nearest; degrees are numbers of bits."""

    def __init__(self, bits: Sequence[int], schemes: Mapping[Matrix, Scheme], storage: torch.dtype) -> None:
        super().__init__(bits)
        self._schemes, self._storage = schemes, storage

    @property
    def statistic(self) -> None:
        return None

    def changed(
        self, matrix: Matrix, weight: torch.Tensor, statistic: Statistic | None, degree: int
    ) -> torch.Tensor:
        scheme = replace(self._schemes[matrix], bits=degree)
        made = round_to_nearest(weight.float(), scheme, self._storage, search=ClipSearch())
        return made.dequantize().to(weight.dtype)


class _Measurement:
    """One model in memory, and the progress of its parts."""

    def __init__(
        self,
        source: Artifact,
        model: Any,
        checkpoint: Checkpoint,
        inside: Mapping[int, Sequence[Matrix]],
        trial: Trial,
        run: Run,
    ) -> None:
        self.model, self.checkpoint, self.inside = model, checkpoint, inside
        self.trial, self.run = trial, run
        self.device = torch.device(run.device)
        self.task = resolve(run.task, source.config)
        self.walk = Walk(source, run.scratch, run, model, checkpoint, self.device)
        self.file = run.scratch / "sensitivity.jsonl"

    def all(self) -> list[Sensitivity]:
        activations = self.walk.calibration()
        if activations is None:
            raise PlanError("sensitivity is measured on calibration text", "give --calibration TEXT")
        require_distribution(self.task)
        self.walk.begin()
        done = _read(self.file)
        found: list[Sensitivity] = []
        self.checkpoint.load(self.checkpoint.names, self.device)
        self.model.tie_weights()
        self.checkpoint.require_filled("")
        with (
            self.walk.reentry() as reentry,
            self.run.reporter.progress(
                f"sensitivity of {len(self.walk.blocks)} blocks", len(self.walk.blocks), "block"
            ) as advance,
        ):
            wanted = self._outputs(reentry, 0, activations)
            for block in self.walk.blocks:
                for part in self._parts(block, reentry, activations):
                    names = tuple(matrix.name for matrix, _ in part)
                    known = done.get(names)
                    if known is None or set(known.divergence) != set(self.trial.degrees):
                        known = self._measured(part, block, reentry, activations, wanted)
                        self._keep(known)
                    found.append(known)
                for batch, recording in zip(activations.batches, activations.recordings, strict=True):
                    reentry.advance(block.position, batch, recording)
                advance(1)
        self.checkpoint.release("")
        return found

    def _parts(self, block: Block, reentry: Reentry, activations: Activations) -> Iterator[_Part]:
        """The matrices of a block that share an input, and its experts together."""
        matrices = self.inside.get(block.position, ())
        if not matrices:
            return
        experts: list[tuple[Matrix, Statistic | None]] = []
        for stage in gathered(self.model, list(matrices), block, reentry, activations, self.trial.statistic):
            for shared in stage:
                entries = [(matrix, shared.statistic) for matrix in shared.matrices]
                experts += [entry for entry in entries if entry[0].expert is not None]
                plain = tuple(entry for entry in entries if entry[0].expert is None)
                if plain:
                    yield plain
        if experts:
            yield tuple(experts)

    def _measured(
        self,
        part: _Part,
        block: Block,
        reentry: Reentry,
        activations: Activations,
        wanted: Sequence[torch.Tensor],
    ) -> Sensitivity:
        matrices = [matrix for matrix, _ in part]
        views = [matrix.of(self.model.get_parameter(matrix.parameter)).detach() for matrix in matrices]
        kept = [view.clone() for view in views]
        first = matrices[0]
        divergence = {}
        for degree in self.trial.degrees:
            for (matrix, statistic), view, original in zip(part, views, kept, strict=True):
                view.copy_(self.trial.changed(matrix, original, statistic, degree))
            outputs = self._outputs(reentry, block.position, activations)
            divergence[degree] = _divergence(outputs, wanted, first.name)
        for view, original in zip(views, kept, strict=True):
            view.copy_(original)
        tie = EXPERTS if first.expert is not None else first.name
        weights = sum(matrix.rows * matrix.columns for matrix in matrices)
        return Sensitivity(tuple(matrix.name for matrix in matrices), tie, weights, divergence)

    def _outputs(self, reentry: Reentry, position: int, activations: Activations) -> list[torch.Tensor]:
        """What the model says from a block on, ``[positions, classes]`` of each batch."""
        outputs = []
        for batch, recording in zip(activations.batches, activations.recordings, strict=True):
            said = self.task.outputs(reentry.finish(position, batch, recording)).flatten(0, -2)
            share = _COMPARED // (said.shape[-1] * len(activations.batches))
            stride = max(1, -(-said.shape[0] // max(share, 1)))
            outputs.append(said[::stride].clone())
        return outputs

    def _keep(self, found: Sensitivity) -> None:
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(found)) + "\n")
        (self.run.scratch / RESUMABLE).touch()


def _divergence(outputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], name: str) -> float:
    """Mean divergence over all positions of all batches."""
    total, count = 0.0, 0
    for said, base in zip(outputs, wanted, strict=True):
        targets = torch.zeros(len(said), dtype=torch.int64, device=said.device)
        total += float(imitation(said, base, targets, Criterion()).loss.sum(dtype=torch.float64))
        count += len(said)
    mean = total / count
    if not math.isfinite(mean):
        raise CalibrationError(
            f"the model's output is not finite with {name} changed", "leave it as it is with --ignore"
        )
    return mean


def _read(file: Path) -> dict[tuple[str, ...], Sensitivity]:
    """What an earlier run measured; a line that it did not finish is measured again."""
    found: dict[tuple[str, ...], Sensitivity] = {}
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for line in lines:
        try:
            document = json.loads(line)
        except json.JSONDecodeError:
            continue
        divergence = {int(bits): float(value) for bits, value in document["divergence"].items()}
        part = tuple(document["part"])
        found[part] = Sensitivity(part, document["tie"], document["weights"], divergence)
    return found
