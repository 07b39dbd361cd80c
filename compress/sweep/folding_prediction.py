"""What moving factors will take, predicted from headers and one short timing of this machine."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from compress.core.passes import Needs
from compress.core.run import Run
from compress.models.blocks import Block
from compress.models.checkpoint import Checkpoint
from compress.sweep.matrices import Matrix
from compress.sweep.prediction import predict_masking, rate


@dataclass(frozen=True)
class Searching:
    """A layer whose error is computed several times.

    Attributes:
        matrix: of the layer.
        times: how often.
    """

    matrix: Matrix
    times: int


def predict_folding(
    layers: Sequence[Searching], blocks: Iterable[Block], model: Any, checkpoint: Checkpoint, run: Run
) -> Needs:
    """A sweep that keeps every shape, one further pass over the text, and the error of every candidate."""
    needs = predict_masking([layer.matrix for layer in layers], blocks, model, checkpoint, run)
    if not any(layer.times for layer in layers):
        return needs
    operations = sum(2 * layer.times * layer.matrix.rows * layer.matrix.columns**2 for layer in layers)
    if run.calibration is not None:
        tokens = run.calibration.samples * run.calibration.sequence_length
        operations += sum(2 * tokens * layer.matrix.columns**2 for layer in layers)
    widest = max(layer.matrix.columns for layer in layers)
    # The second moments of one input, and the product of an error with them.
    moments = 4 * 2 * widest**2
    seconds = needs.seconds + operations / rate(torch.device(run.device))
    if run.device == "cpu":
        return replace(needs, host_bytes=needs.host_bytes + moments, seconds=seconds)
    return replace(needs, device_bytes=needs.device_bytes + moments, seconds=seconds)
