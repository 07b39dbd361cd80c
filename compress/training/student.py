"""The model that is trained: brought from disk into float32, and written back in the precision it had."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compress.core.artifact import Artifact
from compress.core.passes import Meant
from compress.core.run import Run
from compress.formats.shards import write_index, write_shard
from compress.models.checkpoint import Checkpoint
from compress.models.headers import read_model
from compress.models.load import loaded_dtype, skeleton
from compress.models.tasks import FeatureExtraction, resolve
from compress.numerics.fingerprint import fingerprint


class Student:
    """A whole model in float32, whose float weights are all trained.

    Dropout stays off: a student repairs what it lost, in far fewer steps than would overfit it, and the
    same step gives the same loss whenever it is taken.

    Args:
        source: the artifact.
        run: names task and device.

    Raises:
        ModelError: the model cannot be built or filled.
    """

    def __init__(self, source: Artifact, run: Run) -> None:
        self._source = source
        self._device = torch.device(run.device)
        self.model: Any = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
        self._checkpoint = Checkpoint(source, self.model)
        # A pooler is no part of hidden states, and encoders that filled in words come without one.
        self._lacks_parts = isinstance(resolve(run.task, source.config), FeatureExtraction)
        self.reload()

    def reload(self) -> None:
        """Take the weights of the source."""
        self._checkpoint.load(self._checkpoint.names, self._device)
        self.model.tie_weights()
        if self._lacks_parts:
            fill_absent_parts(self.model)
        self._checkpoint.require_filled("")
        self.model.to(self._device)
        for weight in self.model.parameters():
            weight.requires_grad_(weight.is_floating_point())

    def write(self, target: Path, told: Callable[[str, str], None]) -> dict[str, Meant]:
        """Write a folder with the layout of the source: the same files, names and precisions.

        Args:
            target: gets weights, index and everything that travels along.
            told: hears of file and tensor before each is written.

        Returns:
            what every weight on disk must be after loading, by name.
        """
        values = self._values()
        meant: dict[str, Meant] = {}
        files: dict[str, list[str]] = {}
        for name, entry in read_model(self._source.path).items():
            files.setdefault(entry.file.name, []).append(name)
        loaded = loaded_dtype(self._source)

        def bring(name: str) -> torch.Tensor:
            before = self._checkpoint.tensor(name)
            after = values[name].detach().to("cpu", before.dtype) if name in values else before
            if torch.equal(after, before):
                meant[name] = Meant(fingerprint(before), False)
            else:
                meant[name] = Meant(fingerprint(after.to(loaded)), True, _distance(before, after))
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
