"""Making up for channels and heads that are gone: the layer that read them is fitted again.

What the columns that go gave to the outputs is regressed on the inputs that stay, and added to their weights
(`compress.numerics.least_squares`); a bias takes what is constant of it. Inputs and outputs are those of the
model as it was, like the importance by which channels are chosen, so that one pass over the text is enough.

Layers that read the residual stream are fitted likewise where it loses channels. What they will read is the
norm over the channels that stay, which is computed beside the norm over all of them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch

from compress.core.errors import CalibrationError, ModelError
from compress.core.passes import Needs
from compress.core.run import Run
from compress.models.blocks import Block
from compress.models.checkpoint import Checkpoint
from compress.models.load import loaded_dtype
from compress.models.probe import input_dimension, input_features, is_linear, output_features
from compress.numerics.hessian import Hessian
from compress.numerics.least_squares import COLUMNS_RIDGE, Moments, absorbed
from compress.sweep.cutting import Piece
from compress.sweep.narrow_cuts import Cut
from compress.sweep.narrow_hidden import Hidden
from compress.sweep.narrow_model import KeptStream
from compress.sweep.prediction import IMPORT_BYTES, rate
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
    row = {"error": f"{made.before**0.5:.6g}", "repaired_error": f"{made.after**0.5:.6g}"}
    return replace(_fitted(walk, reader, columns, made.change, made.shift), row=row)


def _fitted(
    walk: Walk, reader: str, columns: torch.Tensor, change: torch.Tensor, shift: torch.Tensor | None
) -> Repaired:
    """A layer with only some of its columns and a change added to them, in the precision it has on disk."""
    dimension = input_dimension(walk.model.get_submodule(reader))
    weight = _stored(walk.checkpoint, f"{reader}.weight")
    matrix = weight.T if dimension == 0 else weight
    fitted = matrix[:, columns].double() + change.cpu()
    bias = None
    if shift is not None:
        before = _stored(walk.checkpoint, f"{reader}.bias")
        bias = _within(f"{reader}.bias", (before.double() + shift.cpu()).to(before.dtype))
    fitted = fitted.T if dimension == 0 else fitted
    return Repaired(dimension, _within(f"{reader}.weight", fitted.to(weight.dtype).contiguous()), bias)


def pieces_of(
    walk: Walk, names: Sequence[str], cuts: Mapping[str, Cut], made: Mapping[str, Repaired]
) -> dict[str, Piece]:
    """What is written in place of some tensors, cut and fitted again.

    Args:
        names: on disk.
        cuts: by the names of parameters.
        made: layers that were fitted again, by path.
    """
    found: dict[str, Piece] = {}
    for name in names:
        target = walk.checkpoint.target[name]
        cut = cuts.get(target)
        fitted = _fitted_values(target, cut, made)
        if fitted is None:
            found[name] = Piece(name, {} if cut is None else cut.places)
        else:
            error = _distance(walk.checkpoint.tensor(name), cut, fitted)
            found[name] = Piece(name, fitted=fitted, error=error)
    return found


def _fitted_values(target: str, cut: Cut | None, made: Mapping[str, Repaired]) -> torch.Tensor | None:
    """New values of a parameter, cut; ``None`` where it was not fitted again."""
    layer, _, leaf = target.rpartition(".")
    again = made.get(layer)
    if again is not None and leaf == "weight" and cut is not None:
        return again.cut(cut)
    if again is not None and leaf == "bias" and again.bias is not None:
        return again.bias if cut is None else cut.of(again.bias)
    return None


def _distance(tensor: torch.Tensor, cut: Cut | None, written: torch.Tensor) -> float:
    """Relative Frobenius distance to a tensor of what is left of it, with zeros where it was cut."""
    kept = tensor if cut is None else cut.of(tensor)
    whole, stays = _square(tensor), _square(kept)
    lost = max(0.0, whole - stays) + _square(written.float() - kept.float())
    return math.sqrt(lost / whole) if whole else math.sqrt(lost)


def _square(tensor: torch.Tensor) -> float:
    return float(tensor.float().square().sum(dtype=torch.float64))


@final
class StreamInputs:
    """What one layer reads of the residual stream, in the wide model and in the narrower one.

    The norm in front of it gives other values over fewer channels, and the channels that go are missing. What
    that changes of the layer's outputs is regressed on what it will read.

    Attributes:
        reader: path of the layer.

    Args:
        walk: the wide model, with the block in memory.
        stream: the channels that stay.
        norms: paths of the norms of the block.
    """

    def __init__(self, walk: Walk, stream: KeptStream, reader: str, norms: Sequence[str]) -> None:
        self.reader = reader
        self._walk, self._stream, self._norms = walk, stream, norms
        self._layer = walk.model.get_submodule(reader)
        bias = _stored_name(walk.checkpoint, f"{reader}.bias") is not None
        self._moments = Moments(
            len(stream.kept), output_features(self._layer), intercept=bias, device=walk.device
        )
        # What a norm gave and would give, held so that its address is not used again.
        self._given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @classmethod
    def of_block(
        cls, walk: Walk, hidden: Hidden | None, stream: KeptStream | None, block: Block
    ) -> "list[StreamInputs]":
        """Of all layers of a block that read the stream and lie on disk as they are."""
        if hidden is None or stream is None:
            return []
        residual = hidden.residual
        norms = [name for name in sorted(residual.norms) if name.startswith(f"{block.name}.")]
        readers = [name for name in sorted(residual.readers) if name.startswith(f"{block.name}.")]
        return [cls(walk, stream, reader, norms) for reader in readers]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take in what the layer reads while the context lasts."""

        def norm(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
            with self._stream.statistics(inside=True):
                over_fewer = type(module).forward(module, *args)
            self._given[id(output)] = (output, over_fewer)

        def reading(_: Any, args: tuple[Any, ...]) -> None:
            self._add(args[0])

        with ExitStack() as hooks:
            for name in self._norms:
                handle = self._walk.model.get_submodule(name).register_forward_hook(norm)
                hooks.callback(handle.remove)
            hooks.callback(self._layer.register_forward_pre_hook(reading).remove)
            hooks.callback(self._given.clear)
            yield

    @torch.no_grad()
    def _add(self, wide: torch.Tensor) -> None:
        held = self._given.get(id(wide))
        narrow = self._stream.of(wide if held is None else held[1]).flatten(0, -2)
        self._given.clear()
        wide = wide.flatten(0, -2)
        weight = self._layer.weight.mT if input_dimension(self._layer) == 0 else self._layer.weight
        targets = wide @ weight.T
        kept = self._stream.kept.to(weight.device)
        self._moments.add(narrow, targets - narrow @ weight[:, kept].T, targets)

    def repaired(self) -> Repaired:
        """The layer fitted to its outputs in the wide model.

        Raises:
            CalibrationError: no token came, inputs are not finite, or the least squares cannot be solved.
            ModelError: a new value is beyond the precision in which it is written.
        """
        try:
            found = self._moments.correction(COLUMNS_RIDGE)
        except CalibrationError as error:
            raise CalibrationError(f"{self.reader}: {error.message}", error.hint) from error
        row = {
            "layer": self.reader,
            "kind": "hidden",
            "rows": self._moments.targets,
            "columns": self._moments.columns,
            "tokens": self._moments.tokens,
            "error": f"{found.before**0.5:.6g}",
            "repaired_error": f"{found.after**0.5:.6g}",
        }
        made = _fitted(self._walk, self.reader, self._stream.kept, found.change, found.shift)
        return replace(made, row=row)


@contextmanager
def stacked(streams: Sequence[StreamInputs]) -> Iterator[None]:
    """Watch several layers while the context lasts."""
    with ExitStack() as stack:
        for stream in streams:
            stack.enter_context(stream.watching())
        yield


def with_way_back(needs: Needs, model: Any, checkpoint: Checkpoint, run: Run) -> Needs:
    """What a cut takes with gradients before it: the whole model, and what a batch leaves for it."""
    compute = 4 if run.device == "cpu" else loaded_dtype(checkpoint.source).itemsize
    whole = compute * sum(parameter.numel() for parameter in model.parameters())
    left = 0
    if run.calibration is not None:
        tokens = min(run.calibration.batch_size, run.calibration.samples) * run.calibration.sequence_length
        linear = [module for module in model.modules() if is_linear(module)]
        left = 2 * compute * tokens * sum(input_features(each) + output_features(each) for each in linear)
    on_host = run.device == "cpu"
    return replace(
        needs,
        host_bytes=max(needs.host_bytes, IMPORT_BYTES + (whole + left if on_host else 0)),
        device_bytes=0 if on_host else max(needs.device_bytes, whole + left),
    )


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
