"""The model that is trained: brought from disk into float32, and written back in the precision it had.

A model that is stored as integers is trained on its own grid (`compress.training.integers`) and written back
in its own format: bits, groups and zero points stay, integers and floats change.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, final

import torch

from compress.conversion.packed import Layer, Survey
from compress.core.artifact import Artifact
from compress.core.facts import Fact
from compress.core.passes import Meant
from compress.core.run import Run
from compress.formats.shards import write_index, write_shard
from compress.models.checkpoint import Checkpoint
from compress.models.headers import read_model
from compress.models.load import loaded_dtype, skeleton
from compress.models.tasks import FeatureExtraction, resolve
from compress.numerics.affine import Quantized, quantize
from compress.numerics.fingerprint import fingerprint
from compress.training import integers
from compress.training.trainee import Trainee


@final
class Student(Trainee):
    """A whole model in float32, all of whose float weights are trained, also those behind integers.

    Dropout stays off: a student repairs what it lost, in far fewer steps than would overfit it, and the
    same step gives the same loss whenever it is taken.

    Args:
        source: the artifact.
        run: names task and device.
        rounds: whether integer matrices are rounded onto their grid in every pass; else they are the floats
            that they stand for, until they are written.
        scales: whether the scales of integers are trained too.
        origin: the float model that integers were rounded from, if it is at hand.

    Attributes:
        model: on its device.

    Raises:
        ModelError: the model cannot be built or filled.
        PlanError: it is stored in a way that cannot be trained; or `origin` is another model.
    """

    def __init__(
        self,
        source: Artifact,
        run: Run,
        *,
        rounds: bool = True,
        scales: bool = False,
        origin: Artifact | None = None,
    ) -> None:
        self._source = source
        self._device = torch.device(run.device)
        self._found = integers.survey(source, run) if integers.is_quantized(source) else None
        self._grids: dict[str, integers.Grid] = {}
        # A pooler is no part of hidden states, and encoders that filled in words come without one.
        self._lacks_parts = isinstance(resolve(run.task, source.config), FeatureExtraction)
        if self._found is None:
            self.model: Any = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
            self._checkpoint = Checkpoint(source, self.model)
        else:
            self.model, self._checkpoint = self._found.model, self._found.checkpoint
        self.reload()
        if self._found is not None and rounds:
            self._grids = integers.ground(self._found, origin, run, learns=scales)

    @property
    def quantized(self) -> bool:
        """Whether it is stored as integers."""
        return self._found is not None

    def reload(self) -> None:
        """Take the weights of the source."""
        if self._found is None:
            self._checkpoint.load(self._checkpoint.names, self._device)
            self.model.tie_weights()
        else:
            # Off the grid they are what their integers stand for, and are rounded to them again when written.
            self._grids = {}
            integers.load(self._found, self._device)
        if self._lacks_parts:
            fill_absent_parts(self.model)
        self._checkpoint.require_filled("")
        self.model.to(self._device)
        for weight in self.model.parameters():
            weight.requires_grad_(weight.is_floating_point())

    @torch.no_grad()
    def round(self) -> None:
        """Give matrices that were trained as the floats they stand for the values of the nearest integers."""
        for layer in self._layers:
            if layer.module not in self._grids:
                weight = integers.latent_of(self._there, layer)
                weight.copy_(self._matrix(layer).dequantize())

    def settle(self, target: Path, judged: Callable[[], Mapping[str, float]]) -> dict[str, Any]:
        """See `Trainee.settle`: it is trained in the form in which it is written."""
        return {}

    def write(self, target: Path, told: Callable[[str, str], None]) -> dict[str, Meant]:
        """See `Trainee.write`."""
        values = self._values()
        meant: dict[str, Meant] = {}
        files: dict[str, list[str]] = {}
        for name, entry in read_model(self._source.path).items():
            files.setdefault(entry.file.name, []).append(name)
        # What is read by kernels of others is verified as it is stored.
        loaded = loaded_dtype(self._source) if Fact.TRANSFORMERS in self._source.facts else None
        owners = {name: layer for layer in self._layers for name in layer.names.values()}
        waiting: dict[str, torch.Tensor] = {}

        def bring(name: str) -> torch.Tensor:
            before = self._checkpoint.tensor(name)
            if name in owners:
                weight = f"{owners[name].stem}.weight"
                if weight not in meant:
                    tensors, meant[weight] = self._rewritten(owners[name])
                    waiting.update(tensors)
                return waiting.pop(name, before)
            after = values[name].detach().to("cpu", before.dtype) if name in values else before
            if torch.equal(after, before):
                meant[name] = Meant(fingerprint(before), False)
            else:
                seen = after if loaded is None else after.to(loaded)
                meant[name] = Meant(fingerprint(seen), True, _distance(before, after))
            return after

        written = 0
        for file, names in sorted(files.items()):
            layout = {name: (self._checkpoint.dtype(name), self._checkpoint.shape(name)) for name in names}
            written += write_shard(target / file, layout, bring, partial(told, file))
        if len(files) > 1:
            write_index(target, files, written)
        for path in [self._source.path / "config.json", *self._source.companions]:
            copy = target / path.relative_to(self._source.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        return dict(sorted(meant.items()))

    @property
    def _there(self) -> Survey:
        if self._found is None:
            raise RuntimeError("the model is not stored as integers")
        return self._found

    @property
    def _layers(self) -> tuple[Layer, ...]:
        return () if self._found is None else self._found.layers

    def _matrix(self, layer: Layer) -> Quantized:
        """The integers of a layer as they are now."""
        latent = integers.latent_of(self._there, layer).detach()
        if layer.module in self._grids:
            return self._grids[layer.module].matrix(latent)
        before = self._there.matrix(layer)
        q = quantize(latent.cpu(), before.scale, before.zero, before.scheme)
        return Quantized(q, before.scale, before.zero, before.scheme)

    def _rewritten(self, layer: Layer) -> tuple[dict[str, torch.Tensor], Meant]:
        """What is new of a layer on disk, and what a loader must see."""
        before, after = self._there.matrix(layer), self._matrix(layer)
        value = integers.value_of(layer, after)
        if torch.equal(before.q, after.q) and torch.equal(before.scale, after.scale):
            # Integers that lie under the float's own name are compared as they lie there.
            stored = layer.names.get("weight")
            same = value if stored is None else self._checkpoint.tensor(stored)
            return {}, Meant(fingerprint(same), False)
        tensors = integers.encoded(layer, after, self._source)
        error = _distance(integers.value_of(layer, before), value)
        return tensors, Meant(fingerprint(value), True, error)

    def _values(self) -> dict[str, torch.Tensor]:
        """Trained weights by their names on disk.

        Most have one name there; what transformers put together or renamed while loading is taken apart by
        its own reverse.
        """
        weights = dict(self.model.named_parameters(remove_duplicate=False))
        targets: dict[str, list[str]] = {}
        for name in self._checkpoint.names:
            targets.setdefault(self._checkpoint.target[name], []).append(name)
        values: dict[str, torch.Tensor] = {}
        for target, names in targets.items():
            if target not in weights:
                continue
            weight = weights[target].detach()
            if len(names) == 1 and tuple(weight.shape) == self._checkpoint.shape(names[0]):
                values[names[0]] = weight
            else:
                parts = self._checkpoint.to_disk({target: weight})
                values |= {name: part for name, part in parts.items() if name in names}
        return values


def fill_absent_parts(model: Any) -> None:
    """Give zeros to parts of a model that have no weight on disk at all, so that it can be run."""
    for part in model.children():
        weights = list(part.parameters())
        if weights and all(weight.is_meta for weight in weights):
            for module in part.modules():
                for leaf, weight in list(module.named_parameters(recurse=False)):
                    module._parameters[leaf] = torch.nn.Parameter(torch.zeros_like(weight, device="cpu"))


def _distance(before: torch.Tensor, after: torch.Tensor) -> float:
    """Relative Frobenius distance, rounded so that it is the same on every machine."""
    old = before.double()
    lost = torch.linalg.vector_norm(after.double() - old)
    return float(f"{float(lost / torch.linalg.vector_norm(old).clamp_min(1e-30)):.6g}")
