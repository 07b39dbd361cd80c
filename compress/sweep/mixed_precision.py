"""A number of bits for every part of a model, chosen by its sensitivity, and the rounding with them."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, final

from compress.core.artifact import Artifact
from compress.core.budget import Budget
from compress.core.errors import PlanError
from compress.core.passes import Needs, Outcome
from compress.core.run import Run
from compress.core.scheme import Bits
from compress.formats.compressed_tensors import CompressedTensors
from compress.models.checkpoint import Checkpoint
from compress.models.load import loaded_dtype
from compress.models.tasks import resolve
from compress.numerics.allocation import Infeasible, Option, allocate
from compress.sweep.matrices import Matrix
from compress.sweep.prediction import predict_whole
from compress.sweep.rounder import Rounder
from compress.sweep.selection import Selection, select
from compress.sweep.sensitivity import EXPERTS, Sensitivity, measure, require_distribution
from compress.sweep.walk import placed_skeleton

_STEPS: Final = 1 << 16
"""Steps into which a budget of divergence is parted."""


@final
class MixedPrecision:
    """Rounding under a budget.

    Args:
        rounder: makes the rounder from a number of bits, and others by pattern.
        candidates: numbers of bits to choose among, ascending.
        budget: what the choice may take.
        source: the artifact that is read.
        run: with calibration text.
        samples: calibration sequences to measure on, at most.
    """

    def __init__(
        self,
        rounder: Callable[[Bits, Mapping[str, Bits]], Rounder],
        candidates: Sequence[Bits],
        budget: Budget,
        source: Artifact,
        run: Run,
        *,
        samples: int,
    ) -> None:
        self._rounder, self._candidates, self._budget = rounder, tuple(candidates), budget
        self._source, self._run = source, run
        self._measuring = _measuring(run, samples)

    def check(self) -> Needs:
        """Refuse what cannot work, and predict what measuring and rounding take.

        Raises:
            PlanError: the rounder refuses, the format takes one scheme only, the model has no output
                distribution, or even the fewest bits exceed the budget.
        """
        require_distribution(resolve(self._run.task, self._source.config))
        needs = self._rounder(self._candidates[-1], {}).check(self._source, self._run)
        model, checkpoint, selection = self._selected()
        plain = [matrix.name for matrix in selection.schemes if matrix.expert is None]
        if plain and len(selection.schemes) > 1:
            # Whether unlike layers can be held is known before anything is measured.
            unlike = {_pattern(plain[:1]): self._candidates[0]}
            self._rounder(self._candidates[-1], unlike).check(self._source, self._run)
        self._require_room(checkpoint, selection)
        return predict_whole(
            needs, selection.schemes, model, checkpoint, self._measuring, len(self._candidates)
        )

    def apply(self, target: Path) -> Outcome:
        """Measure, choose, round.

        Raises:
            PlanError: no choice keeps to a budget of divergence.
        """
        parts = _tied(self.measured())
        _, checkpoint, selection = self._selected()
        bits = self._chosen(parts, checkpoint, selection)
        weights = dict.fromkeys(self._candidates, 0)
        for part, own in zip(parts, bits, strict=True):
            weights[own] += part.weights
        most = max(self._candidates, key=lambda candidate: weights[candidate])
        others = {
            _pattern(part.part, experts=part.tie == EXPERTS): own
            for part, own in zip(parts, bits, strict=True)
            if own != most
        }
        outcome = self._rounder(most, others).apply(self._source, target, self._run)
        return replace(outcome, decisions={**_decided(parts, bits), **outcome.decisions})

    def measured(self) -> list[Sensitivity]:
        """What each part does to the output when it is rounded alone."""
        model, checkpoint, selection = self._selected()
        return measure(self._source, model, checkpoint, selection, self._candidates, self._measuring)

    def _selected(self) -> tuple[Any, Checkpoint, Selection]:
        model = placed_skeleton(self._source, self._run)
        checkpoint = Checkpoint(self._source, model)
        rounder = self._rounder(self._candidates[-1], {})
        return model, checkpoint, select(rounder, model, checkpoint, CompressedTensors())

    def _require_room(self, checkpoint: Checkpoint, selection: Selection) -> None:
        least = self._candidates[0]
        if self._budget.of == "bits" and least > self._budget.limit:
            raise PlanError(
                f"a budget of {self._budget} is below the fewest bits to choose among, {least}",
                "give a larger budget, or fewer bits with --candidate",
            )
        if self._budget.of == "bytes":
            taken = self._bytes(list(selection.schemes), least, selection) + _copied(checkpoint, selection)
            if taken > self._budget.limit:
                raise PlanError(
                    f"with {least} bits everywhere it takes {taken:,} bytes, the budget is {self._budget}",
                    "give a larger budget, or prune the model before",
                )

    def _chosen(
        self, parts: Sequence[Sensitivity], checkpoint: Checkpoint, selection: Selection
    ) -> list[Bits]:
        """The number of bits of each part."""
        by_name = {matrix.name: matrix for matrix in selection.schemes}
        sizes = [
            {
                bits: self._bytes([by_name[name] for name in part.part], bits, selection)
                for bits in self._candidates
            }
            for part in parts
        ]
        limit = self._budget.limit
        table: list[list[Option]] = []
        for part, size in zip(parts, sizes, strict=True):
            # Less than nothing is rounding of the measurement.
            divergence = {bits: max(part.divergence[bits], 0.0) for bits in self._candidates}
            cost, loss = {bits: part.weights * bits for bits in self._candidates}, divergence
            if self._budget.of == "bytes":
                cost = size
            elif self._budget.of == "divergence":
                cost = {bits: math.ceil(divergence[bits] / limit * _STEPS) for bits in self._candidates}
                loss = {bits: float(size[bits]) for bits in self._candidates}
            table.append([Option(cost[bits], loss[bits]) for bits in self._candidates])
        room = {
            "bits": math.floor(limit * sum(part.weights for part in parts)),
            "bytes": math.floor(limit) - _copied(checkpoint, selection),
            "divergence": _STEPS,
        }[self._budget.of]
        try:
            chosen = allocate(table, room)
        except Infeasible as refused:
            least = refused.least / _STEPS * limit
            raise PlanError(
                f"the best that {self._candidates[-1]} bits can do is {least:.3g} nats a position, "
                f"the budget is {self._budget}",
                "give a larger budget, smaller groups, or more bits to choose among",
            ) from refused
        return [self._candidates[index] for index in chosen]

    def _bytes(self, matrices: Sequence[Matrix], bits: Bits, selection: Selection) -> int:
        """What matrices take on disk at a number of bits."""
        schemes = {matrix: replace(selection.schemes[matrix], bits=bits) for matrix in matrices}
        part = Selection(selection.blocks, {0: schemes}, {}, {}, ())
        size = loaded_dtype(self._source).itemsize
        return sum(CompressedTensors().encoded_bytes(held, size) for held in part.held())


def _measuring(run: Run, samples: int) -> Run:
    """A run whose calibration text is at most so many sequences: what sensitivity is measured on."""
    if run.calibration is None:
        return run
    fewer = min(samples, run.calibration.samples)
    return replace(run, calibration=replace(run.calibration, samples=fewer))


def _tied(measured: Sequence[Sensitivity]) -> list[Sensitivity]:
    """Parts that get the same number of bits as one part; what they do to the output adds up."""
    tied: dict[str, Sensitivity] = {}
    for part in measured:
        first = tied.get(part.tie)
        if first is None:
            tied[part.tie] = part
            continue
        divergence = {bits: first.divergence[bits] + part.divergence[bits] for bits in first.divergence}
        tied[part.tie] = Sensitivity(
            first.part + part.part, part.tie, first.weights + part.weights, divergence
        )
    return list(tied.values())


def _pattern(names: Sequence[str], *, experts: bool = False) -> str:
    """One pattern that means these matrices; experts are meant by the parameter that holds them all."""
    if not experts:
        return f"re:{'|'.join(re.escape(name) for name in names)}"
    parameters = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return f"re:({'|'.join(re.escape(name) for name in parameters)})[.][0-9]+"


def _copied(checkpoint: Checkpoint, selection: Selection) -> int:
    """Bytes of all tensors that are not rounded."""
    rounded = {name for matrix in selection.schemes for name in matrix.on_disk}
    return sum(
        checkpoint.dtype(name).itemsize * math.prod(checkpoint.shape(name))
        for name in checkpoint.names
        if name not in rounded
    )


def _decided(parts: Sequence[Sensitivity], bits: Sequence[Bits]) -> dict[str, Any]:
    """What was measured and chosen, for the lineage."""
    weights = sum(part.weights for part in parts)
    average = sum(part.weights * own for part, own in zip(parts, bits, strict=True)) / weights
    total = sum(part.divergence[own] for part, own in zip(parts, bits, strict=True))
    return {
        "bits_per_weight": round(average, 6),
        "predicted_divergence": float(f"{total:.6g}"),
        "parts": {
            " ".join(part.part): {
                "bits": own,
                "weights": part.weights,
                "divergence": {str(b): float(f"{value:.6g}") for b, value in part.divergence.items()},
            }
            for part, own in zip(parts, bits, strict=True)
        },
    }
