"""AutoRound: learn for each weight which way to round, so that the output of its whole block changes least.

Where `quantize.gptq` minimises the error of each layer's output, one layer after the other, this one runs
the block over and over and changes all its layers together, for the sake of what the block says: the sign
of the gradient moves an offset of each weight, at most half a step either way, and a factor for the range
of each group. The block reads the activations behind the compressed blocks before it, and is held to what
the *original* block makes of the original activations, so that it makes up for some of their error too.
It gains most at 2 and 3 bits. The price is time: each step runs one calibration batch (`--batch-size`
sequences) through the block and back.

Ours differs from the paper and its reference implementation:

- it begins with the solution of error feedback (`start`), not with the nearest integers, and with ranges
  that were searched in the metric of the layer's output and with either sign of the scale (`clip`,
  `signed_scales`), not with the extremes. Factors may then also stretch a range;
- on request a weight moves by the size of its gradient relative to what that was so far, not by its sign
  alone (`--descent scaled`): one that is near its best place then stays, where the sign changes its integer
  again and again;
- it keeps the best state over *all* calibration sequences, of a few that are looked at (`looks`), the
  beginning among them. The reference compares the losses of different minibatches. So the result is never
  worse than its beginning on the calibration text;
- weights that pruning has set to zero stay zero (`keep_zeros`): error feedback passes them by in the
  beginning, and the descent does not move what begins as zero;
- a minibatch is a batch of the run, drawn without replacement until all have had their turn.

Layers outside the blocks that were asked for (`--include lm_head`) keep their beginning.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, final

from pydantic import Field

from compress.core.errors import CalibrationError
from compress.core.passes import Paper
from compress.core.scheme import Scheme
from compress.sweep.rounder import BlockRounder, IntegerRange, KeepZeros, Rounded, SignedScales, Work

if TYPE_CHECKING:
    import random

    import torch

    from compress.numerics.affine import Quantized
    from compress.numerics.statistic import Statistic
    from compress.sweep.joint import BlockProblem
    from compress.sweep.matrices import Matrix

_REFINEMENT = 2
"""Sweeps of coordinate descent after error feedback, as in the default of `quantize.gptq`."""
_STRETCHED = 2.0
"""The largest factor of a range that was searched, and so may be smaller than the best."""


@final
class AutoRound(BlockRounder):
    """Round by signed gradient descent on the output of each block."""

    summary: ClassVar[str] = (
        "learn the rounding of each block from its output; slower and better at 2 and 3 bits"
    )
    paper: ClassVar[Paper | None] = Paper(
        title="Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs",
        url="https://arxiv.org/abs/2309.05516",
        authors="Cheng, Zhang, Shen, Cai, He, Lv, Liu",
        year=2023,
    )
    examples: ClassVar[tuple[str, ...]] = (
        "--bits 2 --group-size 64 --calibration TEXT",
        "--bits 4 --group-size 128 --iterations 400 --calibration TEXT --batch-size 4",
    )
    calibrated: ClassVar[bool] = True

    iterations: int = Field(
        default=200, ge=0, description="steps of descent for each block; 0 keeps the beginning"
    )
    rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="how far the first step moves an offset, in steps of the grid; falls linearly to zero "
        "[default: 1 / iterations, which lets it go half a step in all; half of that from `feedback`]",
    )
    range_rate: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="how far the first step moves the factor of a range; 0 leaves ranges as they are "
        "[default: the rate; a quarter of it where ranges were searched]",
    )
    descent: Literal["sign", "scaled"] = Field(
        default="sign",
        description="how offsets follow their gradient: `sign` by its sign as in the paper, `scaled` by its "
        "size relative to what it was so far, which costs a float32 copy more",
    )
    looks: int = Field(
        default=5,
        ge=1,
        description="how often, evenly spaced, the error over all calibration sequences is computed; the "
        "best state is kept",
    )
    start: Literal["feedback", "nearest"] = Field(
        default="feedback",
        description="integers to begin with: `feedback` those of error feedback from the layer's input, "
        "`nearest` the closest ones as in the paper",
    )
    clip: Literal["none", "mse", "hessian"] = Field(
        default="hessian",
        description="range to begin with: `none` takes the extremes of a group as in the paper, `mse` the "
        "one with the least squared error of the weights, `hessian` that of the layer's output",
    )
    integer_range: IntegerRange = "full"
    signed_scales: SignedScales = True
    keep_zeros: KeepZeros = True
    damping: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="added to the diagonal of the layer's Hessian for the beginning, relative to its mean; "
        "grows where it is too small",
    )

    @property
    def work(self) -> Work:
        """Steps, looks with that at the beginning, and copies: places, offsets, and what one step makes."""
        copies = 4 if self.descent == "sign" else 5
        return Work(self.iterations, self._looks + 1 if self.iterations else 0, copies)

    def statistic(self, columns: int, device: "torch.device") -> "Statistic":
        """An empty Hessian where the beginning needs one; else a count of what reaches the layer."""
        from compress.numerics.hessian import Hessian
        from compress.numerics.masks import ColumnNorms

        needed = self.start == "feedback" or self.clip == "hessian"
        return Hessian(columns, device) if needed else ColumnNorms(columns, device)

    def round(
        self,
        weight: "torch.Tensor",
        statistic: "Statistic | None",
        scheme: Scheme,
        storage: "torch.dtype",
    ) -> Rounded:
        """The beginning for one float32 matrix ``[rows, columns]``, which may be overwritten.

        Raises:
            CalibrationError: no data reached the layer, or its Hessian cannot be used.
            ModelError: the weight holds NaN or infinite values.
        """
        from compress.numerics.affine import round_to_nearest
        from compress.numerics.feedback import Ranges, solve
        from compress.numerics.hessian import Hessian

        ranges = Ranges(self.clip, self.signed_scales)
        if not isinstance(statistic, Hessian):
            if statistic is not None and (self.start == "feedback" or self.clip == "hessian"):
                raise CalibrationError(
                    f"the beginning needs the Hessian of the layer's input, got {type(statistic).__name__}",
                    "give calibration text, or --start nearest with --clip mse",
                )
            # Without input (an embedding), or without need of it.
            return Rounded(round_to_nearest(weight, scheme, storage, search=ranges.search))
        if self.start == "nearest":
            statistic.check()
            importance = ranges.importance(statistic, scheme, self.damping)
            return Rounded(
                round_to_nearest(weight, scheme, storage, search=ranges.search, importance=importance)
            )
        solution = solve(
            weight,
            statistic,
            scheme,
            storage,
            ranges=ranges,
            damping=self.damping,
            sweeps=_REFINEMENT,
            keep_zeros=self.keep_zeros,
        )
        return Rounded(
            solution.quantized, {"damping": solution.damping, "dead_columns": solution.dead_columns}
        )

    def round_together(
        self, starts: "Mapping[Matrix, Quantized]", problem: "BlockProblem"
    ) -> "dict[Matrix, Rounded]":
        """Descend from the starts, and return the best state that was looked at."""
        from compress.numerics.rounding_search import RoundingSearch

        rate, range_rate = self._rates()
        # A range from the extremes of a group serves no weight better when it grows.
        widest = 1.0 if self.clip == "none" and self.start == "nearest" else _STRETCHED
        searches = {
            matrix: RoundingSearch(
                problem.weight(matrix),
                start,
                widest=widest,
                ranges=range_rate > 0,
                descent=self.descent,
            )
            for matrix, start in starts.items()
        }
        for matrix, start in starts.items():
            problem.put(matrix, start.dequantize())
        best, best_step = dict(starts), 0
        before = least = problem.mean_error()
        due = {round(look * self.iterations / self._looks) for look in range(1, self._looks + 1)}
        order = _order(problem.batches, self.iterations, problem.numbers)
        with problem.reporter.progress(problem.name, self.iterations, "step") as advance:
            for step, batch in enumerate(order):
                left = 1 - step / self.iterations
                _, gradients = problem.gradients(batch)
                for matrix, search in searches.items():
                    search.descend(gradients.pop(matrix), left * rate, left * range_rate)
                    problem.put(matrix, search.quantized().dequantize())
                if step + 1 in due and (error := problem.mean_error()) < least:
                    least, best_step = error, step + 1
                    best = {matrix: search.quantized() for matrix, search in searches.items()}
                problem.reporter.event(
                    "progress.note", text=f"error {least / before if before else 0:.3g} of what it was"
                )
                advance(1)
        notes = {"block_error_before": before, "block_error": least, "step": best_step}
        return {matrix: Rounded(found, notes) for matrix, found in best.items()}

    def _rates(self) -> tuple[float, float]:
        """Of offsets and factors at the first step: smaller where the beginning is good already."""
        rate = self.rate
        if rate is None:
            rate = (0.5 if self.start == "feedback" else 1.0) / max(1, self.iterations)
        if self.range_rate is not None:
            return rate, self.range_rate
        return rate, rate if self.clip == "none" else rate / 4

    @property
    def _looks(self) -> int:
        return min(self.looks, max(1, self.iterations))


def _order(batches: int, steps: int, numbers: "random.Random") -> list[int]:
    """A batch for each step; every batch comes once before any comes again."""
    order: list[int] = []
    while len(order) < steps:
        # From the one draw that Python promises never to change.
        order += sorted(range(batches), key=lambda _: numbers.random())
    return order[:steps]
