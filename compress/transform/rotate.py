"""Rotation: the residual stream in another basis, in which nothing sticks out.

A few channels of a transformer's hidden state are far larger than the rest, and so are the weights that read
them. Rounding spends its levels on them. The hidden state is only ever added to, normalised and multiplied by
matrices, so it may be expressed in any basis: every layer that writes it is multiplied by a rotation and
every layer that reads it by its inverse. In a random basis of signs (a Hadamard matrix with random signs)
outliers spread over all channels. The values of attention heads are rotated head by head as well (`heads`).

The result is an ordinary float model of the same class that computes the same up to the rounding of its own
precision, and nothing is computed at run time that was not computed before. That is QuaRot without its online
rotations, and SpinQuant's merged rotations without learning them. For weights alone; no calibration text is
needed. `transform.awq` scales single channels by calibration, and may follow.

What reads and writes the stream is found from the model itself. Weights of norms go into the layers behind
them. A layer norm takes the mean of all channels away, which a rotation would disturb; there, rotations are
used that leave the mean where it is, so GPT-2, OPT, GPT-NeoX and Phi stay models of their class. A head that
shares the embedding's weight gets one of its own, which makes the model larger by the embedding. A model with
a norm behind its layers (Gemma 2 and 3), behind the sum (BERT), or with a router or fused experts is refused
with the reason.
"""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, final

from pydantic import Field, NonNegativeInt

from compress.core.facts import Fact
from compress.core.passes import Needs, Outcome, Paper, Pass

if TYPE_CHECKING:
    from compress.core.artifact import Artifact
    from compress.core.run import Run


@final
class Rotate(Pass):
    """Rotate the residual stream."""

    summary: ClassVar[str] = "rotate the residual stream so that nothing sticks out; computes the same"
    paper: ClassVar[Paper | None] = Paper(
        title="QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs",
        url="https://arxiv.org/abs/2404.00456",
        authors="Ashkboos et al.",
        year=2024,
    )
    examples: ClassVar[tuple[str, ...]] = ("", "--no-heads --rotation-seed 1")
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFORMERS, Fact.FLOAT_WEIGHTS})

    heads: bool = Field(default=True, description="rotate the values of attention heads too, head by head")
    rotation_seed: NonNegativeInt = Field(
        default=0, description="of the random signs; another one gives another rotation"
    )

    def check(self, source: "Artifact", run: "Run") -> Needs:
        """Refuse what cannot be rotated, and predict the work; see `compress.sweep.rotation`."""
        from compress.sweep.rotation import Asked, check

        return check(Asked(self.rotation_seed, self.heads), source, run)

    def apply(self, source: "Artifact", target: Path, run: "Run") -> Outcome:
        """Rotate block by block; see `compress.sweep.rotation`."""
        from compress.sweep.rotation import Asked, rotate

        return rotate(Asked(self.rotation_seed, self.heads), source, target, run)
