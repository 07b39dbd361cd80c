"""How little a block does: the cosine of what goes into it and what comes out.

Two measures. The *influence* of a block is one minus the mean cosine over tokens (Men et al. 2024,
"ShortGPT", arXiv 2403.03853, equation 1). The *angular distance* between two places of the residual stream is
the mean angle in half turns (Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers",
arXiv 2403.17887, equation 7).
"""

import math
from typing import final

import torch

from compress.numerics.statistic import check_sums

_SMALLEST = 1e-30
"""Below any length that a hidden state has; a vector of zeros has no direction and is similar to none."""


def cosines(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """The cosine of each pair of vectors, float64 ``[...]``, between -1 and 1.

    Args:
        before, after: ``[..., width]`` of any float dtype.

    Raises:
        ValueError: the shapes differ.
    """
    if before.shape != after.shape:
        raise ValueError(f"expected vectors of one shape, got {list(before.shape)} and {list(after.shape)}")
    left, right = before.double(), after.double()
    lengths = torch.linalg.vector_norm(left, dim=-1) * torch.linalg.vector_norm(right, dim=-1)
    # NaN stays NaN, so that inputs that are not finite are not taken for directions.
    found: torch.Tensor = ((left * right).sum(-1) / lengths.clamp_min(_SMALLEST)).clamp(-1.0, 1.0)
    return found


@final
class Influence:
    """One minus the mean cosine of what goes into a block and what comes out, over all tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sum = torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Take in hidden states ``[..., width]`` before and behind the block."""
        found = cosines(before, after)
        self._sum += found.sum().cpu()
        self.tokens += found.numel()

    @property
    def value(self) -> float:
        """Between 0 (the block turns nothing) and 2.

        Raises:
            CalibrationError: no token was seen, or a hidden state was NaN or infinite.
        """
        check_sums(self.tokens, self._sum)
        # What is below zero is rounding.
        return max(0.0, 1.0 - float(self._sum) / self.tokens)


def angular_distance(before: torch.Tensor, after: torch.Tensor) -> float:
    """The mean angle between pairs of vectors, in half turns: 0 for one direction, 1 for opposite ones.

    Args:
        before, after: ``[positions, width]`` of any float dtype, one position or more.

    Raises:
        CalibrationError: there is no position, or a vector is NaN or infinite.
    """
    angles = torch.arccos(cosines(before, after))
    check_sums(angles.numel(), angles)
    return float(angles.mean()) / math.pi
