"""Checkpoints of a training: weights, moments and history, from which it goes on exactly.

A checkpoint is a folder that gets its name when it is complete; the one before goes away after that. So
whenever a process is killed there is at most one step back to go, and never half a checkpoint. Everything
is safetensors, JSON or CSV: nothing is pickled, so a folder of progress can be handed around like a model.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from compress.core.events import Reporter
from compress.core.run import RESUMABLE
from compress.formats.shards import write_shard
from compress.training.history import History

_WEIGHTS = "weights.safetensors"
_OPTIMISER = "optimiser.safetensors"
_STATE = "state.json"
_HISTORY = "history.csv"


@dataclass
class Position:
    """How far a training has come.

    Attributes:
        step: steps that are done.
        best: step after which the loss on the validation text was least; 0 for the model as it came.
        history: of all steps so far.
    """

    step: int
    best: int
    history: History


class Checkpoints:
    """The checkpoints in one folder.

    Args:
        folder: progress that outlives a crash.
        parameters: the trained weights, by name.
        optimiser: AdamW over them.
        reporter: told of each file before it is written.
    """

    def __init__(
        self,
        folder: Path,
        parameters: dict[str, torch.nn.Parameter],
        optimiser: torch.optim.Optimizer,
        reporter: Reporter,
    ) -> None:
        self._folder = folder
        self._parameters = parameters
        self._optimiser = optimiser
        self._reporter = reporter

    def save(self, position: Position) -> None:
        """Keep where the training is; what is no longer needed goes away."""
        event = self._reporter.event
        event("checkpoint.write", step=position.step)
        partial = self._folder / ".checkpoint.partial"
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        self._write(partial / _WEIGHTS, dict(self._parameters))
        self._write(partial / _OPTIMISER, self._moments())
        (partial / _HISTORY).write_text(position.history.csv(), encoding="utf-8")
        state = {"step": position.step, "best": position.best}
        (partial / _STATE).write_text(json.dumps(state), encoding="utf-8")
        complete = self._folder / f"checkpoint-{position.step:08d}"
        if complete.exists():
            # Written before a crash, from the same inputs: the same.
            shutil.rmtree(partial)
        else:
            partial.rename(complete)
        (self._folder / RESUMABLE).touch()
        for other in self._found():
            if other != complete:
                shutil.rmtree(other)
        for file in self._folder.glob("best-*.safetensors"):
            if file != self._best_file(position.best):
                file.unlink()
        event("checkpoint.finish", step=position.step)

    def restore(self, names: tuple[str, ...]) -> Position | None:
        """Bring weights and moments back; ``None`` where there is no checkpoint.

        Args:
            names: of the losses in the history.
        """
        found = self._found()
        if not found:
            return None
        folder = found[-1]
        self._bring(folder / _WEIGHTS)
        self._restore_moments(load_file(folder / _OPTIMISER))
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        return Position(state["step"], state["best"], History.read(folder / _HISTORY, names))

    def save_best(self, step: int) -> None:
        """Keep the weights after a step as the best so far; the checkpoint that comes next refers to it."""
        self._write(self._best_file(step), dict(self._parameters))

    def load_best(self, step: int) -> None:
        """Bring the weights back that `save_best` kept."""
        self._bring(self._best_file(step))

    def _best_file(self, step: int) -> Path:
        return self._folder / f"best-{step:08d}.safetensors"

    def _found(self) -> list[Path]:
        return sorted(self._folder.glob("checkpoint-*"))

    def _write(self, file: Path, tensors: dict[str, Any]) -> None:
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        told: Callable[[str], None] = lambda name: self._reporter.event(  # noqa: E731 - names its two arguments
            "checkpoint.tensor", file=file.name, tensor=name
        )
        write_shard(file, layout, tensors.__getitem__, told)

    @torch.no_grad()
    def _bring(self, file: Path) -> None:
        for name, value in load_file(file).items():
            self._parameters[name].copy_(value)

    def _moments(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}:{key}": value
            for name, parameter in self._parameters.items()
            for key, value in self._optimiser.state.get(parameter, {}).items()
        }

    def _restore_moments(self, tensors: dict[str, torch.Tensor]) -> None:
        for entry, value in tensors.items():
            name, _, key = entry.rpartition(":")
            parameter = self._parameters[name]
            # Also the count of steps, which the fused AdamW keeps beside the weights.
            self._optimiser.state[parameter][key] = value.to(parameter.device)
