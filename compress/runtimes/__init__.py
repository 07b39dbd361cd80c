"""How an artifact is run when it is measured. Which hardware and kernels run it is a runtime's business.

A runtime is found by its file: ``compress/runtimes/torch_int4.py`` is ``torch-int4``. It brings an
artifact into memory and hands back a `Session`, to which every metric speaks. Nothing here imports torch.
"""

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.core.errors import CompressError, PlanError, UsageError, did_you_mean
from compress.core.facts import Fact
from compress.core.run import Device

if TYPE_CHECKING:
    from torch import Tensor

    from compress.core.artifact import Artifact
    from compress.models.tasks import Task


class Unavailable(CompressError):
    """A runtime cannot run an artifact here; in a report that is ``n/a`` with this reason."""

    exit_code = 6


@dataclass(frozen=True)
class Placement:
    """Where and in which precision a model runs.

    Attributes:
        device: where.
        dtype: name of the floating-point type of the computation (``float32``), or ``auto`` for the one
            in which the model is stored.
        trust_remote_code: whether code inside the model folder may run.
    """

    device: Device = "cpu"
    dtype: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Generation:
    """A generation under way.

    Attributes:
        tokens: the newest tokens, int64 ``[batch]``: the most likely ones, so that each step depends on
            the one before, as in serving.
        cache: what the runtime keeps between steps.
        length: tokens in the context of each sequence, without the newest.
        logits: by which the newest tokens were chosen, ``[batch, vocabulary]`` in the runtime's own dtype;
            whoever wants another choice replaces `tokens`. Nothing is computed for them.
    """

    tokens: "Tensor"
    cache: Any
    length: int
    logits: "Tensor | None" = None


class Session(ABC):
    """An artifact in memory, ready to run."""

    @property
    @abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """What runs, for the record: dtype, bytes of weights, layers by kernel, layers kept dense and why."""

    @abstractmethod
    def outputs(self, tokens: "Tensor") -> "Tensor":
        """The task's outputs in float32, on the session's device.

        Args:
            tokens: int64 ``[batch, length]``, sequences of equal length without padding.
        """

    @abstractmethod
    def prefill(self, tokens: "Tensor") -> Generation:
        """Read a prompt, int64 ``[batch, length]``; logits are computed for its last position alone."""

    @abstractmethod
    def decode(self, state: Generation) -> Generation:
        """Read the newest token of each sequence and choose the next. It never stops at an end token."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""


class Runtime(ABC):
    """One way to run artifacts."""

    name: ClassVar[str]
    """The spelling in recipes; the file's name with hyphens."""
    title: ClassVar[str]
    """What it is, in a few words for a person."""
    loads: ClassVar[Fact]
    """The form of artifact that it loads as it is; others are `prepared`."""

    @abstractmethod
    def prepared(
        self, artifact: "Artifact", task: "Task", folder: Path, *, trust_remote_code: bool = False
    ) -> Path:
        """Bring an artifact into the form that this runtime loads, once, before anything is timed.

        Args:
            artifact: of any form.
            task: what it does.
            folder: where to write, if anything has to be written; made where it is not there.
            trust_remote_code: whether code inside the model folder may run.

        Returns:
            The folder to load: the artifact's own where nothing is needed.

        Raises:
            Unavailable: the artifact cannot be brought into this form here.
        """

    @abstractmethod
    def load(self, artifact: "Artifact", task: "Task", placement: Placement) -> Session:
        """Bring an artifact into memory.

        Raises:
            Unavailable: this runtime cannot run this artifact here, and why.
            ModelError: the artifact is damaged.
        """


@cache
def _modules() -> dict[str, str]:
    folder = Path(__file__).resolve().parent
    return {
        file.stem.replace("_", "-"): f"{__name__}.{file.stem}"
        for file in sorted(folder.glob("*.py"))
        if not file.stem.startswith("_")
    }


def names() -> list[str]:
    """The names of all runtimes, without importing any."""
    return sorted(_modules())


def find(name: str) -> Runtime:
    """The runtime with a name.

    Raises:
        UsageError: there is none.
        PlanError: its file breaks the contract.
    """
    if name not in _modules():
        raise UsageError(f"unknown runtime '{name}'", did_you_mean(name, names()))
    module = importlib.import_module(_modules()[name])
    found: list[type[Runtime]] = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Runtime) and value.__module__ == module.__name__
    ]
    if len(found) != 1 or found[0].name != name:
        raise PlanError(f"{module.__name__} must hold exactly one runtime, named '{name}'")
    return found[0]()
