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
from compress.formats.compressed_tensors import INPUT_SCALE, CompressedTensors
from compress.formats.weight_format import WeightFormat
from compress.models.checkpoint import Checkpoint
from compress.models.load import loaded_dtype, skeleton
from compress.numerics.affine import Quantized
from compress.numerics.floats import QuantizedFloats, tensor_scale
from compress.numerics.input_range import Ranged, input_scale
from compress.numerics.statistic import Statistic
from compress.sweep.joint import BlockProblem, JointTreatment
from compress.sweep.matrices import Matrix
from compress.sweep.memory import return_freed
from compress.sweep.prediction import predict
from compress.sweep.rounder import BlockRounder, Rounder
from compress.sweep.selection import Selection, select
from compress.sweep.sweep import Sweep
from compress.sweep.treatment import Replacement, Treated, Treatment
from compress.sweep.verification import rehearse
from compress.sweep.walk import placed_skeleton


def check(rounder: Rounder, source: Artifact, run: Run) -> Needs:
    """Select what would be rounded, refuse what cannot be, and predict the work.

    Raises:
        PlanError: a layer cannot be held, or calibration text is missing.
        UsageError: a pattern matches nothing.
    """
    if rounder.reads_calibration and run.calibration is None:
        what = "the method needs" if rounder.calibrated else "static activations need"
        raise PlanError(f"{what} calibration text", "give --calibration TEXT or data.calibration")
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
    labels = _with_tensor_scales(selection.schemes, checkpoint)
    outcome = Sweep(treatment, source, target, run, model, checkpoint, labels, device).apply()
    decisions = {"format": CompressedTensors.name, "kept": dict(sorted(selection.kept.items()))}
    return replace(outcome, decisions={**decisions, **outcome.decisions})


def _with_tensor_scales(schemes: Mapping[Matrix, Scheme], checkpoint: Checkpoint) -> dict[Matrix, Scheme]:
    """Schemes of ``nvfp4`` with the scale of the whole tensor, for which every weight is read once.

    Servers multiply with several matrices at once (query, key and value; gate and up) and take one such scale
    for them. All matrices of one module get the same: group scales are floats, so a factor between them
    costs nothing.
    """
    if not any(scheme.format == "nvfp4" for scheme in schemes.values()):
        return dict(schemes)
    largest: dict[str, float] = {}
    for matrix in schemes:
        module = matrix.module.rpartition(".")[0]
        names = matrix.on_disk or tuple(
            name for name, target in checkpoint.target.items() if target == matrix.parameter
        )
        for name in names:
            found = float(checkpoint.tensor(name).abs().max())
            largest[module] = max(largest.get(module, 0.0), found)
        return_freed()
    return {
        matrix: replace(scheme, tensor_scale=tensor_scale(largest.get(matrix.module.rpartition(".")[0], 0.0)))
        for matrix, scheme in schemes.items()
    }


@final
@dataclass(frozen=True)
class _Numbers(Replacement):
    """Quantized rows, and the fixed scale of the inputs that they multiply, ``[1]``, where there is one."""

    quantized: Quantized | QuantizedFloats
    input_scale: torch.Tensor | None = None

    def rows(self, start: int, stop: int) -> "_Numbers":
        return _Numbers(self.quantized.rows(start, stop), self.input_scale)

    def value(self) -> torch.Tensor:
        return self.quantized.dequantize()

    def parts(self) -> dict[str, torch.Tensor]:
        parts = self.quantized.parts()
        if self.input_scale is not None:
            parts[INPUT_SCALE] = self.input_scale.repeat(self.quantized.shape[0])
        return parts

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
        return self.rounder.reads_calibration

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
        own = self.rounder.statistic(columns, device)
        return Ranged(own, columns, device) if self.rounder.activations == "static" else own

    def treat(self, weight: torch.Tensor, statistic: Statistic | None, label: Hashable) -> Treated:
        scheme, scale = _scheme(label), None
        if isinstance(statistic, Ranged):
            scale = input_scale(scheme, statistic, self.storage)
            statistic = statistic.inner
        rounded = self.rounder.round(weight, statistic, scheme, self.storage)
        return Treated(_Numbers(rounded.quantized, scale), rounded.notes)

    def rebuilt(self, parts: Mapping[str, torch.Tensor], label: Hashable) -> Replacement:
        scheme = _scheme(label)
        if not scheme.integers:
            return _Numbers(QuantizedFloats.of(parts, scheme, self.storage))
        return _Numbers(Quantized(parts["q"], parts["scale"], parts.get("zero"), scheme))

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
        numbers = {matrix: _numbers(replacement) for matrix, replacement in first.items()}
        starts = {matrix: _integers(entry) for matrix, entry in numbers.items()}
        together = self.rounder.round_together(starts, problem)
        return {
            matrix: Treated(_Numbers(found.quantized, numbers[matrix].input_scale), found.notes)
            for matrix, found in together.items()
        }


def _numbers(replacement: Replacement) -> _Numbers:
    if not isinstance(replacement, _Numbers):
        raise TypeError(f"a rounder's replacement holds numbers, got {type(replacement).__name__}")
    return replacement


def _integers(numbers: _Numbers) -> Quantized:
    if not isinstance(numbers.quantized, Quantized):
        raise TypeError(f"whole blocks are rounded to integers, got {numbers.quantized.scheme}")
    return numbers.quantized


def _configuration(selection: Selection, source: Artifact, run: Run) -> dict[str, Any]:
    """The configuration to write, after a rehearsal of loading it.

    Where transformers cannot prepare a model with packed layers, it may still load it dequantized.
    """
    config = CompressedTensors().configuration(selection.held(), selection.floats(), source.config)
    quantization = config["quantization_config"]
    schemes = set(selection.schemes.values())
    activations = any(scheme.activations != "none" for scheme in schemes)
    if any(scheme.format in ("nvfp4", "mxfp4") for scheme in schemes):
        dtype = loaded_dtype(source)
        if dtype != torch.bfloat16 and activations:
            raise PlanError(
                f"transformers unpacks 4-bit floats to bfloat16, and the model is {_word(dtype)}",
                "convert the model to bfloat16, or quantize its weights alone (--activations none)",
            )
        # Dequantized while it is loaded, a model gets weights of its own dtype.
        if dtype != torch.bfloat16:
            quantization["dequantize"] = True
    try:
        rehearse(source, quantization, run)
    except PlanError as error:
        if activations:
            raise PlanError(
                f"{error.message}; dequantizing while it loads would leave its inputs unquantized",
                "quantize its weights alone (--activations none)",
            ) from error
        if len(schemes) > 1:
            raise PlanError(
                error.message, "give all layers one scheme: such a model can be unpacked while it loads"
            ) from error
        if quantization.get("dequantize"):
            raise
        quantization["dequantize"] = True
        rehearse(source, quantization, run)
    return config


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _scheme(label: Hashable) -> Scheme:
    if not isinstance(label, Scheme):
        raise TypeError(f"a rounder's label is a Scheme, got {type(label).__name__}")
    return label
