"""AWQ: scale up the weights that meet large activations, then round.

Stands for two steps, each with an artifact of its own: `transform.awq`, which finds the factors for exactly
this rounding and leaves a float model that computes the same, and a rounder. Plain rounding (`rounder:
rtn`) is the method of the paper; its range is searched for each group (`clip`), where the paper clips
weights. With `rounder: gptq` the errors that are left are made up for column by column.

Against `quantize.gptq` alone: less is fitted to the calibration text, and rounding needs no factorization.
What cannot take a factor in a model is left alone and named in the lineage of the first step.
"""

from typing import Any, ClassVar, Literal, final

from pydantic import Field, PositiveInt, field_validator

from compress.core.facts import Fact
from compress.core.passes import Expanding, Paper, Pass, build
from compress.sweep.rounder import GroupSize


@final
class Awq(Expanding):
    """Scale, then round."""

    summary: ClassVar[str] = "scale up weights that meet large activations, then round to nearest"
    paper: ClassVar[Paper | None] = Paper(
        title="AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
        url="https://arxiv.org/abs/2306.00978",
        authors="Lin et al.",
        year=2023,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--bits 4 --group-size 128 --calibration TEXT",
        "--bits 3 --group-size 64 --rounder gptq --calibration TEXT --samples 256",
    )
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS, Fact.FLOAT_WEIGHTS})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.INTEGER_WEIGHTS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS})
    calibrated: ClassVar[bool] = True

    bits: Literal[2, 3, 4, 8] = Field(default=4, description="bits of one weight")
    group_size: GroupSize = Field(
        default=128, description="input columns that share a scale, or `channel` for one scale a row"
    )
    symmetric: bool = Field(
        default=True, description="zero is the integer 0; otherwise groups have zero points"
    )
    rounder: Literal["rtn", "gptq"] = Field(
        default="rtn", description="what rounds the scaled weights: quantize.rtn or quantize.gptq"
    )
    clip: Literal["none", "mse"] = Field(
        default="mse",
        description="range of a group: `none` takes its extremes, `mse` the one with the least squared error",
    )
    grid: PositiveInt = Field(default=20, description="exponents from 0 to below 1 that are tried")
    balance: Literal["activations", "both"] = Field(
        default="activations", description="what a factor is a power of, as in transform.awq"
    )
    fallback: Literal["refuse", "channel"] = Field(
        default="refuse",
        description="a layer whose width the group does not divide: refuse the plan, or one scale a row",
    )
    ignore: tuple[str, ...] = Field(
        default=(),
        description="modules to leave in floats and without factors: globs or `re:` regular expressions",
    )
    include: tuple[str, ...] = Field(
        default=(), description="modules outside the blocks to round too, such as `lm_head`"
    )

    @field_validator("group_size")
    @classmethod
    def _positive(cls, value: GroupSize) -> GroupSize:
        if value != "channel" and value < 1:
            raise ValueError("must be a positive number of columns or 'channel'")
        return value

    def expand(self) -> tuple[Pass, ...]:
        """The transform, searching for the rounding that follows, and the rounding."""
        scheme: dict[str, Any] = {
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "integer_range": "full",
            "fallback": self.fallback,
            "ignore": self.ignore,
        }
        return (
            build("transform.awq", {**scheme, "grid": self.grid, "balance": self.balance}),
            build(f"quantize.{self.rounder}", {**scheme, "clip": self.clip, "include": self.include}),
        )
