"""The contract of rounders: what a method that turns floats into integers has to say.

A rounder says which statistic it gathers for a layer and how it rounds one matrix with it. Everything
else (blocks, batches, resume, formats, records) is the sweep's. Nothing here imports torch.
"""

import inspect
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from compress.core.facts import Fact
from compress.core.passes import Needs, Outcome, Pass
from compress.core.scheme import ACTIVATIONS, FLOAT_LAYOUTS, Activations, Bits, Format, Range, Scheme

if TYPE_CHECKING:
    import torch

    from compress.core.artifact import Artifact
    from compress.core.run import Run
    from compress.numerics.affine import Quantized
    from compress.numerics.floats import QuantizedFloats
    from compress.numerics.statistic import Statistic
    from compress.sweep.joint import BlockProblem
    from compress.sweep.matrices import Matrix

GroupSize = int | Literal["channel"]
IntegerRange = Annotated[
    Range,
    Field(
        description="integers of a symmetric scheme: `full` uses all of them, `narrow` leaves out the lowest"
    ),
]
"""The option ``integer_range``, which every rounder has, each with its own default."""
SignedScales = Annotated[
    bool,
    Field(
        description="let a scale be negative where that fits a group better; needs a searched range (`clip`) "
        "and the `full` integer range"
    ),
]
"""The option ``signed_scales`` of rounders that search the range of a group."""
KeepZeros = Annotated[
    bool, Field(description="weights that are exactly zero, as pruning leaves them, stay zero")
]
"""The option ``keep_zeros`` of rounders that would move them otherwise."""


@dataclass(frozen=True)
class Rounded:
    """One matrix after rounding.

    Attributes:
        quantized: the numbers with their scales, already in the precision that will be stored.
        notes: what the method did to get there (damping, clipped share), for the table of layers.
    """

    quantized: "Quantized | QuantizedFloats"
    notes: Mapping[str, float | int | str] = field(default_factory=dict)


class Override(BaseModel):
    """Other numbers for the modules whose name matches."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    match: str = Field(description="glob (`*.down_proj`) or `re:` regular expression over module names")
    bits: Bits | None = Field(default=None, description="bits for these modules")
    group_size: GroupSize | None = Field(default=None, description="group size for these modules")
    symmetric: bool | None = Field(default=None, description="symmetry for these modules")


class Rounder(Pass):
    """A pass that rounds the linear layers of a model, each on its own or with a statistic of its input."""

    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS, Fact.FLOAT_WEIGHTS})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.INTEGER_WEIGHTS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS})
    calibrated_with: ClassVar[Mapping[str, frozenset[str]]] = {"activations": frozenset({"static"})}
    formats: ClassVar[tuple[Format, ...]] = ("int",)
    """What it can round to."""

    bits: Bits = Field(default=4, description="bits of one weight")
    group_size: GroupSize = Field(
        default=128, description="input columns that share a scale, or `channel` for one scale a row"
    )
    symmetric: bool = Field(
        default=True, description="zero is the integer 0; otherwise groups have zero points"
    )
    format: Format = Field(
        default="int",
        description="what weights are rounded to: `int`; `fp8` (E4M3, one scale a row); `nvfp4` or `mxfp4` "
        "(E2M1 in groups of 16 or 32), which settle bits and group themselves",
    )
    activations: Activations = Field(
        default="none",
        description="what happens to a layer's inputs while the model runs: `none`, or rounding to 8 bits "
        "(to 4-bit floats beside `nvfp4` and `mxfp4`) with a scale for each token (`dynamic`) or a fixed one "
        "from calibration text (`static`); with integers it takes 8 bits and one scale a row",
    )
    fallback: Literal["refuse", "channel"] = Field(
        default="refuse",
        description="a layer whose width the group does not divide: refuse the plan, or one scale a row",
    )
    ignore: tuple[str, ...] = Field(
        default=(), description="modules to leave in floats: globs or `re:` regular expressions"
    )
    include: tuple[str, ...] = Field(
        default=(),
        description="modules outside the blocks to compress too, such as `lm_head` or `*embed_tokens`",
    )
    overrides: tuple[Override, ...] = Field(
        default=(), description="other bits, group or symmetry for modules by pattern; the last match wins"
    )

    @field_validator("group_size")
    @classmethod
    def _positive(cls, value: GroupSize) -> GroupSize:
        if value != "channel" and value < 1:
            raise ValueError("must be a positive number of columns or 'channel'")
        return value

    @model_validator(mode="before")
    @classmethod
    def _settled(cls, given: Any) -> Any:
        """Fill in the bits and the group that a format or quantized activations leave no choice about."""
        if not isinstance(given, Mapping):
            return given
        name = given.get("format", "int")
        if name in FLOAT_LAYOUTS:
            bits, group = FLOAT_LAYOUTS[name]
        elif name == "int" and given.get("activations", "none") != "none":
            bits, group = 8, None
        else:
            return given
        return {"bits": bits, "group_size": "channel" if group is None else group, **given}

    @field_validator("format")
    @classmethod
    def _fits_format(cls, value: Format, info: ValidationInfo) -> Format:
        if value not in cls.formats:
            raise ValueError(
                f"this method rounds to {', '.join(cls.formats)}; quantize.rtn rounds to every format"
            )
        if value in FLOAT_LAYOUTS:
            bits, group = FLOAT_LAYOUTS[value]
            wanted = {"bits": bits, "group_size": "channel" if group is None else group, "symmetric": True}
            _require(value, wanted, info.data)
        return value

    @field_validator("activations")
    @classmethod
    def _fits_activations(cls, value: Activations, info: ValidationInfo) -> Activations:
        name: Format = info.data.get("format", "int")
        if value not in ACTIVATIONS[name]:
            allowed = " or ".join(f"`{word}`" for word in ACTIVATIONS[name])
            raise ValueError(f"{name} takes {allowed}")
        if value != "none" and name == "int":
            # What servers multiply integers with: W8A8, a scale a row and a scale a token or a tensor.
            wanted = {"bits": 8, "group_size": "channel", "symmetric": True}
            _require(f"int with {value} activations", wanted, info.data)
        return value

    @field_validator("overrides")
    @classmethod
    def _fits_overrides(cls, value: tuple[Override, ...], info: ValidationInfo) -> tuple[Override, ...]:
        if value and (info.data.get("format", "int") != "int" or info.data.get("activations") != "none"):
            raise ValueError(
                "a float format and quantized activations settle the numbers of every layer; "
                "leave layers in floats with `ignore`"
            )
        return value

    if TYPE_CHECKING:
        # Each rounder has it, as a field in its own place among the options and with its own default.
        integer_range: Range

    @classmethod
    def __pydantic_init_subclass__(cls, **settings: Any) -> None:
        """Refuse a rounder without the option where it is written, before anything reads it."""
        super().__pydantic_init_subclass__(**settings)
        if not inspect.isabstract(cls) and "integer_range" not in cls.model_fields:
            raise TypeError(f"{cls.__name__} lacks the option `integer_range: IntegerRange = ...`")

    @property
    def range(self) -> Range:
        """The integer range of a symmetric scheme (`compress.core.scheme.Scheme.range`)."""
        return self.integer_range

    @abstractmethod
    def statistic(self, columns: int, device: "torch.device") -> "Statistic | None":
        """A fresh accumulator for one layer input of this many columns; ``None`` when no data is needed."""

    @abstractmethod
    def round(
        self,
        weight: "torch.Tensor",
        statistic: "Statistic | None",
        scheme: Scheme,
        storage: "torch.dtype",
    ) -> Rounded:
        """Round one matrix.

        Args:
            weight: float32 ``[rows, columns]``, free to be overwritten. Rows of several layers that share
                an input and a scheme may come stacked in one call.
            statistic: of the layer's input, or ``None`` for a method without data.
            scheme: bits, group, symmetry and range.
            storage: the dtype in which scales are stored; scales are rounded to it *before* the integers
                are chosen, so that what is written is what was meant.

        Raises:
            CalibrationError: the statistic cannot be used, and what to do.
        """

    def scheme_for(self, module: str) -> Scheme:
        """The scheme of one module after overrides; the fallback is applied by the sweep's selection."""
        from compress.core.patterns import matches

        bits, group, symmetric = self.bits, self.group_size, self.symmetric
        for override in self.overrides:
            if matches(override.match, module):
                bits = override.bits if override.bits is not None else bits
                group = override.group_size if override.group_size is not None else group
                symmetric = override.symmetric if override.symmetric is not None else symmetric
        return Scheme(
            bits,
            None if group == "channel" else group,
            symmetric,
            self.range,
            format=self.format,
            activations=self.activations,
        )

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse layers that cannot be held, and predict the work; see `compress.sweep.quantization`."""
        from compress.sweep.quantization import check

        return check(self, source, run)

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Sweep over the blocks and round their layers; see `compress.sweep.quantization`."""
        from compress.sweep.quantization import quantize

        return quantize(self, source, target, run)


def _require(subject: str, wanted: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse options that a format does not leave open.

    Raises:
        ValueError: naming the first one.
    """
    for name, value in wanted.items():
        if name in given and given[name] != value:
            raise ValueError(f"{subject} has {name}={value}, got {given[name]}; leave {name} out")


@dataclass(frozen=True)
class Work:
    """What a rounder does with each block beyond one matrix at a time, for predictions.

    Attributes:
        steps: batches that run through the block with their gradients.
        looks: passes over all batches without gradients.
        copies: float32 copies of all selected weights of the block that are in memory meanwhile.
    """

    steps: int
    looks: int
    copies: int


class BlockRounder(Rounder):
    """A rounder that, having rounded each matrix of a block, changes all of them for the block's output.

    `Rounder.round` gives the beginning. Matrices outside the blocks keep it.
    """

    @property
    @abstractmethod
    def work(self) -> Work:
        """What it does with each block."""

    @abstractmethod
    def round_together(
        self, starts: "Mapping[Matrix, Quantized]", problem: "BlockProblem"
    ) -> "dict[Matrix, Rounded]":
        """Round all selected matrices of one block.

        Args:
            starts: what `round` made of each.
            problem: the block's output error as a function of the values of its matrices, which hold the
                weights of the source when it comes.

        Returns:
            for every matrix its final integers, and notes beside those of its start.
        """
