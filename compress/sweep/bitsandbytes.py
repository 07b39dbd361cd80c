"""Rounding into the formats of bitsandbytes on the streaming sweep: what is selected, how it is written."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.passes import Needs, Outcome
from compress.core.run import Run
from compress.formats import bitsandbytes as stored
from compress.models.blocks import find_blocks
from compress.models.checkpoint import Checkpoint
from compress.models.load import loaded_dtype, skeleton
from compress.numerics.statistic import Statistic
from compress.sweep.matrices import Matrix, find_matrices
from compress.sweep.prediction import predict_rewriting
from compress.sweep.selection import check_patterns, ignored, unheld
from compress.sweep.sweep import Sweep
from compress.sweep.treatment import Replacement, SeparateTreatment, Treated
from compress.sweep.verification import prepared
from compress.sweep.walk import placed_skeleton


@dataclass(frozen=True)
class Form:
    """How matrices are stored.

    Attributes:
        kind: of the format.
        double: whether the magnitudes of blocks are rounded too.
    """

    kind: stored.Kind
    double: bool = True

    def __str__(self) -> str:
        return self.kind if self.double or self.kind == "int8" else f"{self.kind}, float32 magnitudes"


def check(form: Form, ignore: tuple[str, ...], source: Artifact, run: Run) -> Needs:
    """Select what would be rounded, refuse what cannot be held, and predict the work.

    Raises:
        EnvironmentFault: bitsandbytes is not installed.
        PlanError: a layer that the format, or transformers with it, cannot hold.
        UsageError: a pattern of names matches nothing.
    """
    stored.require()
    model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
    checkpoint = Checkpoint(source, model)
    matrices, _ = _select(ignore, model, checkpoint)
    _configuration(form, matrices, model, source, run)
    rounded = {
        name: stored.encoded_bytes(form.kind, matrix.rows, matrix.columns, double=form.double)
        for matrix in matrices
        for name in matrix.on_disk
    }
    return predict_rewriting(rounded, find_blocks(model), model, checkpoint, run)


def quantize(form: Form, ignore: tuple[str, ...], source: Artifact, target: Path, run: Run) -> Outcome:
    """Round the linear layers of all blocks, from disk to disk."""
    model = placed_skeleton(source, run)
    checkpoint = Checkpoint(source, model)
    matrices, kept = _select(ignore, model, checkpoint)
    config = _configuration(form, matrices, model, source, run)
    treatment = _Rounding(loaded_dtype(source), config)
    labels = dict.fromkeys(matrices, form)
    device = torch.device(run.device)
    outcome = Sweep(treatment, source, target, run, model, checkpoint, labels, device).apply()
    decisions = {"format": f"bitsandbytes {form}", "kept": dict(sorted(kept.items()))}
    return replace(outcome, decisions={**decisions, **outcome.decisions})


def _select(
    ignore: tuple[str, ...], model: Any, checkpoint: Checkpoint
) -> tuple[list[Matrix], dict[str, str]]:
    """The matrices to round in the order of the model, and what stays in floats with the reason."""
    kept: dict[str, str] = {}
    matrices: list[Matrix] = []
    for block in find_blocks(model):
        found = find_matrices(model, block.name, checkpoint)
        kept |= unheld(found, ignore, "bitsandbytes")
        for matrix in found.matrices:
            if ignored(ignore, matrix):
                kept[matrix.name] = "ignored"
            elif matrix.expert is not None:
                raise PlanError(
                    f"{matrix.parameter} holds fused experts, which transformers loads in floats only",
                    f"leave them as they are with --ignore '*.{matrix.module.rpartition('.')[2]}', "
                    "or use quantize.rtn",
                )
            else:
                matrices.append(matrix)
    check_patterns({"--ignore": ignore}, model, {matrix.name for matrix in matrices} | set(kept))
    if not matrices:
        raise PlanError("no layer is left to round", "loosen --ignore")
    return matrices, kept


def _configuration(
    form: Form, matrices: list[Matrix], model: Any, source: Artifact, run: Run
) -> dict[str, Any]:
    """The configuration to write, after a rehearsal of loading it."""
    rounded = {matrix.module for matrix in matrices}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    floats = [name for name in linear if name not in rounded]
    loaded = loaded_dtype(source)
    config = stored.configuration(form.kind, floats, source.config, loaded, double=form.double)
    rehearsed, _ = prepared(source, config["quantization_config"], run)
    for name in linear:
        packed = stored.is_layer(rehearsed.get_submodule(name))
        if packed != (name in rounded):
            raise PlanError(
                f"transformers would load {name} {'rounded' if packed else 'in floats'}, and it is to be "
                f"{'left in floats' if packed else 'rounded'}",
                "ignore modules by patterns that tell them apart from the others by name",
            )
    return config


@final
@dataclass(frozen=True)
class _Values(Replacement):
    """Rows as a loader sees them; the whole matrix also as it is stored."""

    values: torch.Tensor
    whole: stored.Stored | None

    def rows(self, start: int, stop: int) -> "_Values":
        whole = self.whole if stop - start == len(self.values) else None
        return _Values(self.values[start:stop], whole)

    def value(self) -> torch.Tensor:
        return self.values

    def parts(self) -> dict[str, torch.Tensor]:
        if self.whole is None:
            raise ValueError("blocks of numbers go across rows, so a part of a matrix is not stored alone")
        return dict(self.whole.tensors)

    def notes(self) -> Mapping[str, float | int | str]:
        return {}


@final
@dataclass(frozen=True)
class _Rounding(SeparateTreatment):
    """A format of bitsandbytes as a treatment; labels are forms.

    Attributes:
        loaded: the precision in which a loader holds floats.
        config: the configuration to write.
    """

    loaded: torch.dtype
    config: Mapping[str, Any]

    @property
    def calibrated(self) -> bool:
        return False

    def statistic(self, columns: int, device: torch.device) -> None:
        return None

    def treat(self, weight: torch.Tensor, statistic: Statistic | None, label: Hashable) -> Treated:
        if not isinstance(label, Form):
            raise TypeError(f"the label of a matrix is its form, got {type(label).__name__}")
        held = weight.to(self.loaded)
        made = (
            stored.round_int8(held) if label.kind == "int8" else stored.round_nf4(held, double=label.double)
        )
        return Treated(_Values(made.value, made))

    def rebuilt(self, parts: Mapping[str, torch.Tensor], label: Hashable) -> Replacement:
        raise TypeError("only fused experts are rebuilt from parts, and bitsandbytes holds none")

    def encode(
        self, weight: str, parts: Mapping[str, torch.Tensor], label: Hashable
    ) -> dict[str, torch.Tensor]:
        return stored.Stored(parts, parts["weight"]).named(weight)

    def configuration(self) -> dict[str, Any]:
        return dict(self.config)
