"""Making up for channels and heads that are gone: the layer that read them is fitted again.

What the columns that go gave to the outputs is regressed on the inputs that stay, and added to their weights
(`compress.numerics.least_squares`); a bias takes what is constant of it. Inputs and outputs are those of the
model as it was, like the importance by which channels are chosen, so that one pass over the text is enough.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch

from compress.core.errors import CalibrationError, ModelError
from compress.core.passes import Needs
from compress.core.run import Run
from compress.models.checkpoint import Checkpoint
from compress.models.probe import input_dimension, input_features, output_features
from compress.numerics.hessian import Hessian
from compress.numerics.least_squares import absorbed
from compress.sweep.narrow_cuts import Cut
from compress.sweep.prediction import rate
from compress.sweep.walk import Walk


@final
class ReaderInputs:
    """Second moments of what one layer reads, before anything is cut.

    Attributes:
        bias: whether the layer has a bias that may move: one that lies on disk as it is.
        moments: of the inputs, with a one behind them where there is such a bias.

    Args:
        walk: the wide model.
        reader: path of the layer.
    """

    def __init__(self, walk: Walk, reader: str) -> None:
        module = walk.model.get_submodule(reader)
        self.bias = _stored_name(walk.checkpoint, f"{reader}.bias") is not None
        self.moments = Hessian(input_features(module) + int(self.bias), walk.device)

    def add(self, inputs: torch.Tensor) -> None:
        """Take in what came in front of the layer, ``[..., columns]``."""
        rows = inputs.flatten(0, -2)
        if self.bias:
            rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        self.moments.add(rows)


@dataclass(frozen=True)
class Repaired:
    """A layer that was fitted again.

    Attributes:
        dimension: along which its weight has only the columns that stay.
        weight: in the precision that it has on disk, all of its rows.
        bias: likewise; ``None`` where it stays.
        row: what the table of layers says of it.
    """

    dimension: int
    weight: torch.Tensor
    bias: torch.Tensor | None
    row: Mapping[str, Any] = field(default_factory=dict)

    def cut(self, cut: Cut) -> torch.Tensor:
        """The weight without the rows that a cut takes out of it as well."""
        rows = {dimension: places for dimension, places in cut.places.items() if dimension != self.dimension}
        return Cut(cut.parameter, rows).of(self.weight)


def repaired(walk: Walk, reader: str, kept: Sequence[int], inputs: ReaderInputs) -> Repaired:
    """Fit a layer to its own outputs with the columns that stay.

    Args:
        reader: path of the layer.
        kept: its columns that stay, in order.

    Raises:
        CalibrationError: no token came, inputs are not finite, or the least squares cannot be solved.
        ModelError: a new value is beyond the precision in which it is written.
    """
    dimension = input_dimension(walk.model.get_submodule(reader))
    weight = _stored(walk.checkpoint, f"{reader}.weight")
    matrix = weight.T if dimension == 0 else weight
    columns = torch.tensor(list(kept))
    try:
        inputs.moments.check()
        made = absorbed(matrix, inputs.moments.matrix, columns, intercept=inputs.bias)
    except CalibrationError as error:
        raise CalibrationError(f"{reader}: {error.message}", error.hint) from error
    fitted = matrix[:, columns].double() + made.change.cpu()
    bias = None
    if made.shift is not None:
        before = _stored(walk.checkpoint, f"{reader}.bias")
        bias = _within(f"{reader}.bias", (before.double() + made.shift.cpu()).to(before.dtype))
    fitted = fitted.T if dimension == 0 else fitted
    row = {"error": f"{made.before**0.5:.6g}", "repaired_error": f"{made.after**0.5:.6g}"}
    return Repaired(dimension, _within(f"{reader}.weight", fitted.to(weight.dtype).contiguous()), bias, row)


def with_repair(needs: Needs, readers: Iterable[str], model: Any, run: Run) -> Needs:
    """What a cut takes with the repair of its readers.

    Args:
        needs: without it.
        readers: paths of the layers.
    """
    layers = [model.get_submodule(reader) for reader in readers]
    widest = max(map(input_features, layers))
    # Sums in single precision; the system, a copy of it and its factor in double.
    moments = (4 + 3 * 8) * widest**2 + 8 * widest * max(map(output_features, layers))
    tokens = 0 if run.calibration is None else run.calibration.samples * run.calibration.sequence_length
    operations = sum(
        input_features(layer) ** 2 * (2 * tokens + input_features(layer) + 2 * output_features(layer))
        for layer in layers
    )
    on_host = run.device == "cpu"
    return replace(
        needs,
        host_bytes=needs.host_bytes + (moments if on_host else 0),
        device_bytes=needs.device_bytes + (0 if on_host else moments),
        seconds=needs.seconds + operations / rate(torch.device(run.device)),
    )


def _within(name: str, values: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(values).all()):
        raise ModelError(
            f"{name} would leave the range of {values.dtype}", "convert the model to bfloat16 first"
        )
    return values


def _stored_name(checkpoint: Checkpoint, parameter: str) -> str | None:
    """The name on disk of a parameter that lies there as it is; ``None`` where there is none."""
    files = [name for name in checkpoint.names if checkpoint.target[name] == parameter]
    return files[0] if len(files) == 1 else None


def _stored(checkpoint: Checkpoint, parameter: str) -> torch.Tensor:
    name = _stored_name(checkpoint, parameter)
    if name is None:
        raise ModelError(
            f"{parameter} does not lie on disk as it is", "save the model with a current transformers first"
        )
    return checkpoint.tensor(name)
