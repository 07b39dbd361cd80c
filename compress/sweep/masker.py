"""The contract of methods that set single weights to zero and leave the shapes as they are.

A method says what it gathers of a layer's input and what it makes of one matrix. Everything else (blocks,
batches, how many weights each layer loses, resume, records) is the sweep's. Nothing here imports torch.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from compress.core.facts import Fact
from compress.core.passes import Needs, Outcome, Pass
from compress.sweep.zeros import Among, Pattern, Zeros

if TYPE_CHECKING:
    import torch

    from compress.core.artifact import Artifact
    from compress.core.run import Run
    from compress.numerics.statistic import Statistic

USUAL_SPARSITY = 0.5
USUAL_SPREAD = 0.08
USUAL_OUTLIER_FACTOR = 5.0

Ratios = Literal["uniform", "outliers", "sensitivity"]
"""How the weights that go are shared out among layers."""


@dataclass(frozen=True)
class Pruned:
    """One matrix after pruning.

    Attributes:
        weight: float32 ``[rows, columns]``, with zeros.
        notes: what the method did to get there, for the table of layers.
    """

    weight: "torch.Tensor"
    notes: Mapping[str, float | int | str] = field(default_factory=dict)


class Masker(Pass):
    """A pass that sets weights to zero, matrix by matrix."""

    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS, Fact.FLOAT_WEIGHTS})
    calibrated_with: ClassVar[Mapping[str, frozenset[str]]] = {
        "ratios": frozenset({"outliers", "sensitivity"})
    }
    staged: ClassVar[bool] = False
    """Whether a matrix sees what was done to those before it in its own block."""
    scored_by_input: ClassVar[bool] = True
    """Whether inputs count in the scores that stand for the method where sensitivity is measured."""

    sparsity: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of the weights that become zero, rounded down to whole weights; 0.5 where no "
        "`pattern` is given either",
    )
    pattern: str | None = Field(
        default=None,
        description="N:M in place of a share: at most N weights that are not zero among each M neighbours "
        "of a row, such as 2:4 or 4:8",
    )
    ratios: Ratios = Field(
        default="uniform",
        description="how the share differs from layer to layer with the same mean: not at all (`uniform`); "
        "by block, the less the more outliers it has (`outliers`, OWL); by matrices that read one input, so "
        "that the measured change of the output is least (`sensitivity`)",
    )
    spread: float | None = Field(
        default=None,
        gt=0,
        le=0.5,
        description="with `ratios`: how far shares lie from their mean at most (`sensitivity`), or half of "
        "the largest distance between two of them (`outliers`); 0.08 where none is given",
    )
    outlier_factor: float | None = Field(
        default=None,
        gt=1,
        description="with `outliers`: a weight is one when its magnitude times input is so many times the "
        "mean of its block; 5 where none is given",
    )
    measured_samples: PositiveInt = Field(
        default=16, description="with `sensitivity`: calibration sequences that it is measured on, at most"
    )
    ignore: tuple[str, ...] = Field(
        default=(), description="modules to leave whole: globs or `re:` regular expressions"
    )
    include: tuple[str, ...] = Field(
        default=(), description="linear layers outside the blocks to prune too, such as `lm_head`"
    )

    @field_validator("pattern")
    @classmethod
    def _is_a_pattern(cls, value: str | None) -> str | None:
        if value is not None:
            Pattern.parse(value)
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.sparsity is not None and self.pattern is not None:
            raise ValueError("give either sparsity or pattern: a pattern says the share as well")
        if self.pattern is not None and self.ratios != "uniform":
            raise ValueError(
                "a pattern leaves the same share in every layer: take sparsity with these ratios"
            )
        if self.spread is not None and self.ratios == "uniform":
            raise ValueError("spread is for ratios that differ: outliers or sensitivity")
        if self.outlier_factor is not None and self.ratios != "outliers":
            raise ValueError("outlier_factor is for ratios by outliers")
        return self

    @property
    @abstractmethod
    def among(self) -> Among | Literal["model"]:
        """What the share is of, where no pattern is given; of the whole model by magnitudes alone."""

    @property
    @abstractmethod
    def products(self) -> int:
        """How often a matrix is multiplied with the second moments of its input, for predictions."""

    @abstractmethod
    def statistic(self, columns: int, device: "torch.device") -> "Statistic | None":
        """A fresh accumulator for one layer input of so many columns; ``None`` when no data is needed."""

    @abstractmethod
    def prune(self, weight: "torch.Tensor", statistic: "Statistic | None", zeros: Zeros) -> Pruned:
        """Set weights of one matrix to zero.

        Args:
            weight: float32 ``[rows, columns]``, free to be overwritten. Rows of several layers that share an
                input may come stacked in one call where rows are not compared with each other.
            statistic: of the layer's input, or ``None`` for a method without data.
            zeros: how many.

        Raises:
            CalibrationError: the statistic cannot be used, and what to do.
        """

    @property
    def zeros(self) -> Zeros:
        """How much goes, of a matrix that loses what is asked for on average."""
        if self.pattern is not None:
            pattern = Pattern.parse(self.pattern)
            return Zeros(1 - pattern.kept / pattern.of, pattern)
        sparsity = USUAL_SPARSITY if self.sparsity is None else self.sparsity
        return Zeros(sparsity, None, "row" if self.among == "row" else "matrix")

    @property
    def uniform(self) -> bool:
        """Whether all matrices lose the same share."""
        return self.ratios == "uniform" and (self.among != "model" or self.pattern is not None)

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse what cannot be pruned, and predict the work; see `compress.sweep.masking`."""
        from compress.sweep.masking import check

        return check(self, source, run)

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Sweep over the blocks and prune their matrices; see `compress.sweep.masking`."""
        from compress.sweep.masking import mask

        return mask(self, source, target, run)
