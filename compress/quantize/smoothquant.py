"""SmoothQuant: 8-bit weights and 8-bit inputs, with outliers of the inputs moved into the weights first.

Stands for two steps, each with an artifact of its own: `transform.smoothquant`, which divides outlying
channels into the norm before them and leaves a float model that computes the same, and a rounder with one
scale a row. Inputs are rounded while the model runs, with a scale for each token (`activations: dynamic`) or
a fixed one from the calibration text (`static`, which saves finding it and cuts off what is larger).

Both operands of a product are then 8-bit numbers, which servers multiply about twice as fast as 16-bit
floats. What it buys over `quantize.rtn` with the same activations is what outliers would have cost: a lot in
large decoders, little in small models and encoders. With `--format fp8` outliers cost less to begin with,
because floats hold large and small numbers alike. Layers whose input nothing can take a factor from are
rounded all the same, and named in the lineage of the first step.
"""

from typing import Any, ClassVar, Literal, final

from pydantic import Field

from compress.core.facts import Fact
from compress.core.passes import Expanding, Paper, Pass, build
from compress.sweep.folding_pass import Producers


@final
class SmoothQuant(Expanding):
    """Smooth, then round weights and inputs to 8 bits."""

    summary: ClassVar[str] = "8-bit weights and activations, outliers moved into the weights first"
    paper: ClassVar[Paper | None] = Paper(
        title="SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
        url="https://arxiv.org/abs/2211.10438",
        authors="Xiao et al.",
        year=2022,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--calibration TEXT",
        "--alpha 0.75 --activations static --rounder gptq --calibration TEXT --samples 256",
    )
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS, Fact.FLOAT_WEIGHTS})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.INTEGER_WEIGHTS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS})
    calibrated: ClassVar[bool] = True

    alpha: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="how much of the difficulty moves from activations to weights, as in "
        "transform.smoothquant",
    )
    producers: Producers = Field(
        default="norms",
        description="what takes the factors: `norms` alone, as in the paper, or `all`: linear layers too "
        "whose features reach the input by products alone",
    )
    format: Literal["int", "fp8"] = Field(
        default="int", description="8-bit numbers of weights and inputs: integers or floats (E4M3)"
    )
    activations: Literal["dynamic", "static"] = Field(
        default="dynamic",
        description="scale of the inputs while the model runs: `dynamic` for each token, `static` a fixed "
        "one from the calibration text",
    )
    rounder: Literal["rtn", "gptq"] = Field(
        default="rtn",
        description="what rounds the smoothed weights: quantize.rtn or, integers alone, quantize.gptq",
    )
    ignore: tuple[str, ...] = Field(
        default=(),
        description="modules to leave in floats and without factors: globs or `re:` regular expressions",
    )
    include: tuple[str, ...] = Field(
        default=(), description="modules outside the blocks to round too, such as `lm_head`"
    )

    def expand(self) -> tuple[Pass, ...]:
        """The transform, and the rounding of weights and inputs."""
        smoothing: dict[str, Any] = {"alpha": self.alpha, "producers": self.producers, "ignore": self.ignore}
        rounding: dict[str, Any] = {
            "format": self.format,
            "bits": 8,
            "group_size": "channel",
            "activations": self.activations,
            "ignore": self.ignore,
            "include": self.include,
        }
        return build("transform.smoothquant", smoothing), build(f"quantize.{self.rounder}", rounding)
