"""Rounders on the streaming sweep: what is selected, how it is rounded, and how it is written."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.passes import Needs, Outcome
from compress.core.run import Run
from compress.core.scheme import Scheme
from compress.formats.compressed_tensors import CompressedTensors
from compress.formats.weight_format import WeightFormat
from compress.models.checkpoint import Checkpoint
from compress.models.load import loaded_dtype, skeleton
from compress.numerics.affine import Quantized
from compress.numerics.statistic import Statistic
from compress.sweep.joint import BlockProblem, JointTreatment
from compress.sweep.matrices import Matrix
from compress.sweep.prediction import predict
from compress.sweep.rounder import BlockRounder, Rounder
from compress.sweep.selection import Selection, select
from compress.sweep.sweep import Sweep
from compress.sweep.treatment import Replacement, Treated, Treatment
from compress.sweep.verification import prepared
from compress.sweep.walk import placed_skeleton


def check(rounder: Rounder, source: Artifact, run: Run) -> Needs:
    """Select what would be rounded, refuse what cannot be, and predict the work.

    Raises:
        PlanError: a layer cannot be held, or calibration text is missing.
        UsageError: a pattern matches nothing.
    """
    if rounder.calibrated and run.calibration is None:
        raise PlanError("the method needs calibration text", "give --calibration TEXT or data.calibration")
    model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
    checkpoint = Checkpoint(source, model)
    selection = select(rounder, model, checkpoint, CompressedTensors())
    _configuration(selection, source, run)
    return predict(rounder, selection, model, checkpoint, CompressedTensors(), run)


def quantize(rounder: Rounder, source: Artifact, target: Path, run: Run) -> Outcome:
    """Round the selected matrices of a model, block by block, from disk to disk.

    Blocks are computed in float32 on a CPU, where it is as fast as anything and the most exact, and in
    the model's own precision on a GPU.
    """
    device = torch.device(run.device)
    storage = loaded_dtype(source)
    model = placed_skeleton(source, run)
    checkpoint = Checkpoint(source, model)
    selection = select(rounder, model, checkpoint, CompressedTensors())
    config = _configuration(selection, source, run)
    treatment = _Rounding(rounder, storage, config, CompressedTensors())
    outcome = Sweep(treatment, source, target, run, model, checkpoint, selection.schemes, device).apply()
    decisions = {"format": CompressedTensors.name, "kept": dict(sorted(selection.kept.items()))}
    return replace(outcome, decisions={**decisions, **outcome.decisions})


@final
@dataclass(frozen=True)
class _Integers(Replacement):
    """Quantized rows."""

    quantized: Quantized

    def rows(self, start: int, stop: int) -> "_Integers":
        return _Integers(self.quantized.rows(start, stop))

    def value(self) -> torch.Tensor:
        return self.quantized.dequantize()

    def parts(self) -> dict[str, torch.Tensor]:
        parts = {"q": self.quantized.q, "scale": self.quantized.scale}
        return parts if self.quantized.zero is None else {**parts, "zero": self.quantized.zero}

    def notes(self) -> Mapping[str, float | int | str]:
        return {}


@final
@dataclass(frozen=True)
class _Rounding(Treatment):
    """A rounder as a treatment; labels are schemes."""

    rounder: Rounder
    storage: torch.dtype
    config: Mapping[str, Any]
    weight_format: WeightFormat

    @property
    def calibrated(self) -> bool:
        return self.rounder.calibrated

    @property
    def staged(self) -> bool:
        return True

    @property
    def original(self) -> bool:
        return self.joint is not None

    @property
    def joint(self) -> JointTreatment | None:
        return _JointRounding(self.rounder) if isinstance(self.rounder, BlockRounder) else None

    def statistic(self, columns: int, device: torch.device) -> Statistic | None:
        return self.rounder.statistic(columns, device)

    def treat(self, weight: torch.Tensor, statistic: Statistic | None, label: Hashable) -> Treated:
        rounded = self.rounder.round(weight, statistic, _scheme(label), self.storage)
        return Treated(_Integers(rounded.quantized), rounded.notes)

    def rebuilt(self, parts: Mapping[str, torch.Tensor], label: Hashable) -> Replacement:
        return _Integers(Quantized(parts["q"], parts["scale"], parts.get("zero"), _scheme(label)))

    def encode(
        self, weight: str, parts: Mapping[str, torch.Tensor], label: Hashable
    ) -> dict[str, torch.Tensor]:
        return self.weight_format.encode(weight, parts, _scheme(label))

    def configuration(self) -> dict[str, Any]:
        return dict(self.config)


@final
@dataclass(frozen=True)
class _JointRounding(JointTreatment):
    """The second half of a rounder that works on whole blocks."""

    rounder: BlockRounder

    def treat(
        self,
        first: Mapping[Matrix, Replacement],
        labels: Mapping[Matrix, Hashable],
        problem: BlockProblem,
    ) -> dict[Matrix, Treated]:
        starts = {matrix: _integers(replacement) for matrix, replacement in first.items()}
        together = self.rounder.round_together(starts, problem)
        return {
            matrix: Treated(_Integers(found.quantized), found.notes) for matrix, found in together.items()
        }


def _integers(replacement: Replacement) -> Quantized:
    if not isinstance(replacement, _Integers):
        raise TypeError(f"a rounder's replacement holds integers, got {type(replacement).__name__}")
    return replacement.quantized


def _configuration(selection: Selection, source: Artifact, run: Run) -> dict[str, Any]:
    """The configuration to write, after a rehearsal of loading it.

    Where transformers cannot prepare a model with packed layers, it may still load it dequantized.
    """
    config = CompressedTensors().configuration(selection.held(), selection.floats(), source.config)
    try:
        prepared(source, config["quantization_config"], run)
    except PlanError:
        if config["quantization_config"].get("dequantize") or len(set(selection.schemes.values())) > 1:
            raise
        config["quantization_config"]["dequantize"] = True
        prepared(source, config["quantization_config"], run)
    return config


def _scheme(label: Hashable) -> Scheme:
    if not isinstance(label, Scheme):
        raise TypeError(f"a rounder's label is a Scheme, got {type(label).__name__}")
    return label
