"""What is trained, by what a method asks for: a whole model, or adapters on a frozen one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from compress.core.artifact import Artifact
from compress.core.passes import Meant
from compress.core.run import Run
from compress.training.objective import Losses, Objective
from compress.training.trainer import Trainer


class Trainee(ABC):
    """A model that a training changes.

    Attributes:
        model: of transformers, on its device; what of it requires a gradient is trained.
    """

    model: Any

    @abstractmethod
    def reload(self) -> None:
        """Take the weights of the source."""

    @abstractmethod
    def settle(self, target: Path, judged: Callable[[], Mapping[str, float]]) -> dict[str, Any]:
        """Bring what was trained into the form in which it is written.

        Args:
            target: the folder of the artifact, for what is written beside the model.
            judged: the losses on the validation text as the model is now, by name.

        Returns:
            what the lineage should remember of it.
        """

    @abstractmethod
    def write(self, target: Path, told: Callable[[str, str], None]) -> dict[str, Meant]:
        """Write a folder with the layout of the source: the same files, names, precisions and formats.

        Args:
            target: gets weights, index and everything that travels along.
            told: hears of file and tensor before each is written.

        Returns:
            what every weight on disk must be after loading, by its float name.

        Raises:
            PlanError: a trained number has no place in the format.
        """


def check(method: Trainer, source: Artifact, run: Run) -> None:
    """Refuse what cannot be trained in the way that a method asks for.

    Raises:
        PlanError, EnvironmentFault: what, and why.
    """
    from compress.training import adapters, integers
    from compress.training.adapter_options import AdapterOptions

    integers.check(method, source, run)
    if isinstance(method, AdapterOptions):
        adapters.check(method, source, run)


def trainee_of(method: Trainer, source: Artifact, run: Run) -> Trainee:
    """The model that a method trains, filled and ready."""
    from compress.training import integers
    from compress.training.adapter_options import AdapterOptions
    from compress.training.adapters import Adapted
    from compress.training.student import Student

    if isinstance(method, AdapterOptions):
        return Adapted(method, source, run)
    return Student(source, run, scales=method.scales == "train", origin=integers.origin_of(run))


def means_of(objective: Objective, windows: torch.Tensor, batch: int, device: str) -> dict[str, float]:
    """The mean losses over windows of tokens ``[windows, length]``, by name."""
    total: Losses | None = None
    for part in windows.split(batch):
        losses = objective.judge(part.to(device))
        total = losses if total is None else total.plus(losses)
    return {} if total is None else total.means()
