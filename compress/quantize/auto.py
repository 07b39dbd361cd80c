"""Bits where they are worth most: each part of the model gets its own number of them, under a budget.

First every part (the matrices that read one input, and all experts together) is rounded alone, to each
number of bits, and the divergence of the model's output is measured (`compress.sweep.sensitivity`; the same
table comes from ``compress analyze sensitivity``). Then the numbers of bits are chosen that make the sum of
these divergences least under the budget (`compress.numerics.allocation`), and a rounder does its work with
them. The result is one checkpoint of mixed precision, in symmetric schemes, which is what its readers load.

The budget is an average of bits a weight, a size of the tensors on disk, or a sum of divergences. Scales
come on top of bits a weight, as they do when one says of a model that it has 4 bits; a size counts them.
The divergences are those of rounding to nearest; `quantize.gptq` and its like stay below them.

On a Llama of 4 million parameters with `quantize.gptq`, 4.0 bits chosen so diverge 5% less than 4 bits
everywhere, and 3.5 bits 10% less than the line between 3 and 4 (one draw of calibration text;
`benchmarks/mixed_precision.py`).

Measuring holds the whole model in memory and runs it once for every part and number of bits. A few thousand
tokens are enough for it; the rounder sees all of the calibration text.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, final

from pydantic import Field, field_validator, model_validator

from compress.core.budget import Budget, bytes_of
from compress.core.errors import UsageError, did_you_mean
from compress.core.facts import Fact
from compress.core.passes import Delegating, Needs, Outcome, Paper, build, find, own_names
from compress.core.scheme import Bits
from compress.sweep.rounder import GroupSize, Rounder

if TYPE_CHECKING:
    from compress.core.artifact import Artifact
    from compress.core.run import Run
    from compress.sweep.mixed_precision import MixedPrecision
    from compress.sweep.sensitivity import Sensitivity

_USUAL_BITS = 4.0


@final
class Auto(Delegating):
    """Mixed precision under a budget."""

    summary: ClassVar[str] = "choose the bits of every layer by what they do to the output, under a budget"
    paper: ClassVar[Paper | None] = Paper(
        title="HAWQ: Hessian AWare Quantization of Neural Networks with Mixed-Precision",
        url="https://arxiv.org/abs/1905.03696",
        authors="Dong et al.",
        year=2019,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--bits-per-weight 4.0 --calibration TEXT",
        "--size 2GB --group-size 64 --calibration TEXT",
        "--max-kl 0.02 --candidate 4 --candidate 8 --calibration TEXT",
    )
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS, Fact.FLOAT_WEIGHTS})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.INTEGER_WEIGHTS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS})
    calibrated: ClassVar[bool] = True

    bits_per_weight: float | None = Field(
        default=None,
        ge=2,
        le=8,
        description="budget: average bits of the rounded weights, scales not counted; 4 where none is given",
    )
    size: str | None = Field(
        default=None, description="budget: most bytes of all tensors on disk, such as `2GB` or `600MiB`"
    )
    max_kl: float | None = Field(
        default=None,
        gt=0,
        description="budget: largest sum of the parts' divergences, in nats a position, with as few bytes "
        "as it takes",
    )
    candidates: tuple[Bits, ...] = Field(
        default=(2, 3, 4, 5, 6, 8), description="numbers of bits that a part may get"
    )
    rounder: str = Field(default="gptq", description="quantize method that rounds, at its defaults")
    group_size: GroupSize = Field(
        default=128, description="input columns that share a scale, or `channel` for one scale a row"
    )
    fallback: Literal["refuse", "channel"] = Field(
        default="refuse",
        description="a layer whose width the group does not divide: refuse the plan, or one scale a row",
    )
    ignore: tuple[str, ...] = Field(
        default=(), description="modules to leave in floats: globs or `re:` regular expressions"
    )
    measured_samples: int = Field(
        default=16, ge=1, description="calibration sequences that sensitivity is measured on, at most"
    )

    @field_validator("candidates")
    @classmethod
    def _several(cls, value: tuple[Bits, ...]) -> tuple[Bits, ...]:
        if len(set(value)) < 2:
            raise ValueError("give at least two numbers of bits to choose among")
        return tuple(sorted(set(value)))

    @field_validator("size")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        if value is not None:
            bytes_of(value)
        return value

    @model_validator(mode="after")
    def _one_budget(self) -> "Auto":
        given = [name for name in ("bits_per_weight", "size", "max_kl") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"one budget at a time, got {' and '.join(given)}")
        return self

    @property
    def budget(self) -> Budget:
        """What was given, or four bits a weight."""
        if self.size is not None:
            return Budget("bytes", bytes_of(self.size))
        if self.max_kl is not None:
            return Budget("divergence", self.max_kl)
        return Budget("bits", _USUAL_BITS if self.bits_per_weight is None else self.bits_per_weight)

    @property
    def delegate(self) -> Rounder:
        """The rounder, with one number of bits for all matrices.

        Raises:
            UsageError: no rounder has this name.
        """
        return self._rounder(self.candidates[-1], {})

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse what cannot be rounded or held, and predict; see `compress.sweep.mixed_precision`."""
        return self._mixed(source, run).check()

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Measure, choose and round; see `compress.sweep.mixed_precision`."""
        return self._mixed(source, run).apply(target)

    def measured(self, source: "Artifact", run: "Run") -> "list[Sensitivity]":
        """What each part does to the output when it is rounded alone, to each of the candidates."""
        return self._mixed(source, run).measured()

    def _mixed(self, source: "Artifact", run: "Run") -> "MixedPrecision":
        from compress.sweep.mixed_precision import MixedPrecision

        return MixedPrecision(
            self._rounder, self.candidates, self.budget, source, run, samples=self.measured_samples
        )

    def _rounder(self, bits: Bits, others: Mapping[str, Bits]) -> Rounder:
        """The rounder with a number of bits, and other ones by pattern."""
        rounders = {
            name.partition(".")[2]
            for name in own_names()
            if name.startswith("quantize.") and issubclass(find(name), Rounder)
        }
        if self.rounder not in rounders:
            raise UsageError(
                f"quantize.auto: rounder '{self.rounder}' is unknown", did_you_mean(self.rounder, rounders)
            )
        built = build(
            f"quantize.{self.rounder}",
            {
                "bits": bits,
                "group_size": self.group_size,
                "fallback": self.fallback,
                "ignore": self.ignore,
                "overrides": [{"match": pattern, "bits": other} for pattern, other in others.items()],
            },
        )
        if not isinstance(built, Rounder):
            raise TypeError(f"quantize.{self.rounder} is no rounder")
        return built
