"""Making up for channels of the residual stream that are gone: what is left is fitted to the original model.

The stream that stays says more of what went than nothing: what lies outside the span is correlated with what
lies inside, at every place in another way. So what each norm of the original model gave is regressed on what
the norm of the narrow model gives there, and all that read the norm see it through that. Then the last layer
of the block that adds to the stream is fitted to the original hidden state, as far as that lies in the span.
Both are ridge regressions of what is lost (`compress.numerics.least_squares`). The narrow model's inputs are
those behind the blocks that have been repaired already, so that what is still wrong does not add up.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import nn

from compress.core.errors import CalibrationError
from compress.models.blocks import Block, Recording, Reentry, hidden_state
from compress.models.folds import Fold
from compress.models.probe import input_dimension, input_features, output_features
from compress.models.writers import Writer
from compress.numerics.least_squares import COLUMNS_RIDGE, Moments, ridge
from compress.numerics.precision import full_precision
from compress.numerics.statistic import check_sums
from compress.sweep.activations import Activations
from compress.sweep.slice_model import SlicedModel
from compress.sweep.slice_weights import SliceWeights
from compress.sweep.walk import Walk

_STRENGTH: Final = COLUMNS_RIDGE


@dataclass(frozen=True)
class Fitted:
    """How far a layer's inputs or outputs are from the original ones, relative to their size.

    Attributes:
        tokens: that were seen.
        before: without the fit.
        after: with it.
    """

    tokens: int
    before: float
    after: float

    def row(self, prefix: str = "") -> dict[str, Any]:
        """As the table of layers says it."""
        return {
            f"{prefix}error": f"{self.before:.6g}",
            f"{prefix}repaired_error": f"{self.after:.6g}",
        }


@final
@dataclass
class SliceRepair:
    """Fits the parts of a narrow model to the wide one, block by block.

    Attributes:
        walk: the wide model.
        small: the narrow one.
        weights: makes its weights; how readers see a norm is changed in it.
        activations: recordings of the narrow model, and the original ones of the wide model.
    """

    walk: Walk
    small: SlicedModel
    weights: SliceWeights
    activations: Activations

    def norm(self, norm: Fold, block: Block, wide: Reentry, narrow: Reentry) -> Fitted:
        """Fit how the readers of one norm in a block see it.

        Raises:
            CalibrationError: what it gives is not finite, or the least squares cannot be solved.
        """
        sums = self._sums(norm)
        before, after = (model.get_submodule(norm.name) for model in (self.walk.model, self.small.model))
        for batch, original, recording in self._batches():
            with _outgoing(before) as wanted:
                wide.run(block.position, batch, original)
            with _outgoing(after) as came:
                narrow.run(block.position, batch, recording)
            sums.add(came, wanted)
        return self._fit(norm, sums)

    def last_norm(self, norm: Fold, stack: int) -> Fitted:
        """Fit how the readers of a norm behind the blocks see it.

        Raises:
            CalibrationError: as `norm`.
        """
        sums = self._sums(norm)
        before, after = (model.get_submodule(norm.name) for model in (self.walk.model, self.small.model))
        for _, original, recording in self._batches():
            with torch.no_grad():
                wanted = before(original.hidden[stack].to(self.walk.device))
                came = after(recording.hidden[stack].to(self.walk.device))
            sums.add([came], [wanted])
        return self._fit(norm, sums)

    def writer(
        self, block: Block, writer: Writer, scale: float, narrow: Reentry
    ) -> tuple[dict[str, Any], Fitted]:
        """Fit the last layer of a block so that the narrow stream comes near to the original one.

        Args:
            scale: what its output is multiplied by on its way into the narrow stream.

        Returns:
            what is added to its parameters, float64 by their names.

        Raises:
            CalibrationError: hidden states are not finite, or the least squares cannot be solved.
        """
        path = f"{block.name}.{writer.layer}"
        layer = self.small.model.get_submodule(path)
        bias = getattr(layer, "bias", None) is not None
        moments = Moments(
            input_features(layer), output_features(layer), intercept=bias, device=self.walk.device
        )
        for batch, original, recording in self._batches():
            with _incoming(layer) as inputs:
                said = hidden_state(narrow.run(block.position, batch, recording)).float()
            wanted = original.hidden[block.stack].to(self.walk.device).float() @ self.weights.into
            moments.add(inputs[0], ((wanted - said) / scale).flatten(0, -2), wanted.flatten(0, -2))
        with _named(path):
            found = moments.correction()
        added = {f"{path}.weight": found.change.T if input_dimension(layer) == 0 else found.change}
        if found.shift is not None:
            added[f"{path}.bias"] = found.shift
        sizes = (math.sqrt(each) * abs(scale) for each in (found.before, found.after))
        return added, Fitted(moments.tokens, *sizes)

    # -- sums over the text --------------------------------------------------------------------------

    def _batches(self) -> Iterator[tuple[dict[str, torch.Tensor], Recording, Recording]]:
        held = self.activations
        yield from zip(held.batches, held.original, held.recordings, strict=True)

    def _sums(self, norm: Fold) -> "_Sums":
        return _Sums(norm, self.weights, self.small)

    def _fit(self, norm: Fold, sums: "_Sums") -> Fitted:
        with _named(norm.name):
            change, fitted = sums.solved()
        self.weights.changes[norm.name] = change
        return fitted


@final
class _Sums:
    """Second moments of what a narrow norm gives, and of it with what is lost to its readers."""

    def __init__(self, norm: Fold, weights: SliceWeights, small: SlicedModel) -> None:
        width, kept = weights.into.shape
        self._seen = weights.seen(norm)
        self._added = weights.before(norm).added
        module = small.model.get_submodule(norm.name)
        others = [module.get_parameter(leaf).float() for leaf in norm.offsets if leaf != norm.weight]
        self._carried = others[0] if others else None
        device = weights.into.device
        self._gram = torch.zeros(kept, kept, device=device)
        self._moment = torch.zeros(kept, width, device=device)
        self._lost = torch.zeros((), dtype=torch.float64, device=device)
        self._whole = torch.zeros((), dtype=torch.float64, device=device)
        self._tokens = 0

    @torch.no_grad()
    def add(self, came: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> None:
        """Take in what the norms of the narrow and of the wide model gave for the same tokens."""
        with full_precision():
            for narrow, wide in zip(came, wanted, strict=True):
                rows, targets = narrow.flatten(0, -2).float(), wide.flatten(0, -2).float()
                if self._carried is not None:
                    rows = rows - self._carried
                if self._added is not None:
                    targets = targets - self._added
                lost = targets - rows @ self._seen.T
                self._gram.addmm_(rows.T, rows)
                self._moment.addmm_(rows.T, lost)
                self._lost += lost.square().sum(dtype=torch.float64)
                self._whole += targets.square().sum(dtype=torch.float64)
                self._tokens += len(rows)

    def solved(self) -> tuple[torch.Tensor, Fitted]:
        """What is added to how readers see the norm, float32 ``[width, kept]``."""
        check_sums(self._tokens, self._gram.diagonal())
        check_sums(self._tokens, self._lost)
        found = ridge(self._gram, self._moment, _STRENGTH)
        gained = 2 * (found * self._moment).sum() - (found * (self._gram.double() @ found)).sum()
        whole = float(self._whole) or 1.0
        lost, left = float(self._lost), max(0.0, float(self._lost - gained))
        fitted = Fitted(self._tokens, math.sqrt(lost / whole), math.sqrt(left / whole))
        return found.T.float().contiguous(), fitted


@contextmanager
def _named(layer: str) -> Iterator[None]:
    """Say of which layer an error speaks."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(f"{layer}: {error.message}", error.hint) from error


@contextmanager
def _outgoing(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What a module gives while the context lasts."""
    given: list[torch.Tensor] = []
    hook = module.register_forward_hook(lambda _, __, output: given.append(output.detach()))
    try:
        yield given
    finally:
        hook.remove()


@contextmanager
def _incoming(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What a layer reads while the context lasts, ``[tokens, columns]`` of each call."""
    inputs: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().flatten(0, -2)))
    try:
        yield inputs
    finally:
        hook.remove()
