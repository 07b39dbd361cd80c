"""Which scales can be stored: what a fit or a search may end at."""

import torch

from compress.core.scheme import Scheme
from compress.numerics.affine import smallest_scale

_HEADROOM = 1 - 2.0**-7
"""Keeps the largest level below the largest number of the storage dtype, rounding of the scale included."""


def stored_scales(wish: torch.Tensor, before: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The scales nearest to a wish that can be stored: finite, never zero, and no level out of reach.

    Args:
        wish: float32 ``[rows, groups]``; a scale that is not a number keeps its value from before.
        before: ``[rows, groups]`` in the storage dtype, stored and so storable.

    Returns:
        scales of the dtype of ``before``; the sign is that of the wish.
    """
    storage = before.dtype
    limit = torch.finfo(storage).max / scheme.steps * _HEADROOM
    bounded = wish.abs().clamp(smallest_scale(storage), limit)
    # Whatever was stored before may be stored again, to the bit.
    bounded = torch.where(wish.abs() == before.float().abs(), wish.abs(), bounded)
    found = torch.copysign(bounded, wish).to(storage)
    return torch.where(torch.isfinite(wish), found, before)
