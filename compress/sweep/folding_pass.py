"""The contract of smoothers: what a method that moves factors between layers has to say.

A smoother says which statistic it gathers for a layer's input and which factors follow from it. Where factors
can go, batches, resume, proof and writing are the sweep's. Nothing here imports torch.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.core.facts import Fact
from compress.core.passes import Needs, Outcome, Pass

if TYPE_CHECKING:
    import torch

    from compress.core.artifact import Artifact
    from compress.core.run import Run
    from compress.numerics.smoothing import Reading
    from compress.numerics.statistic import Statistic

Producers = Literal["norms", "all"]


@dataclass(frozen=True)
class Solved:
    """The factors of one fold.

    Attributes:
        scales: positive, ``[channels]``: the readers' inputs are divided by them.
        notes: what the method did to get there, for the table of layers.
    """

    scales: "torch.Tensor"
    notes: Mapping[str, float | int | str] = field(default_factory=dict)


class Smoother(Pass):
    """A pass that divides channels of layers' inputs by factors, and multiplies the columns by them."""

    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS, Fact.FLOAT_WEIGHTS})
    calibrated: ClassVar[bool] = True

    ignore: tuple[str, ...] = Field(
        default=(),
        description="modules to leave alone: globs or `re:` regular expressions. Layers that share an input "
        "are left alone together",
    )

    @property
    @abstractmethod
    def into(self) -> Producers:
        """What may take a factor: norms alone, or linear layers as well."""

    @property
    @abstractmethod
    def tried(self) -> int:
        """How often the readers' output error is computed for a fold; for the prediction of time."""

    @abstractmethod
    def refusal(self, columns: int) -> str:
        """Why a layer with so many input columns cannot be served; empty where it can."""

    @abstractmethod
    def statistic(self, columns: int, device: "torch.device") -> "Statistic":
        """A fresh accumulator for an input of so many columns."""

    @abstractmethod
    def solve(self, readings: "Sequence[Reading]", count: int, storage: "torch.dtype") -> Solved:
        """The factors of one fold.

        Args:
            readings: the layers that read it, stacked where they share an input, with its statistic.
            count: of channels.
            storage: the dtype in which the model holds its weights.

        Raises:
            CalibrationError: a statistic cannot be used, and what to do.
        """

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Find where factors can go, refuse what cannot work, and predict; see `compress.sweep.folding`."""
        from compress.sweep.folding import check

        return check(self, source, run)

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Sweep over the blocks and move factors; see `compress.sweep.folding`."""
        from compress.sweep.folding import fold

        return fold(self, source, target, run)
