"""Which divergences a student is judged by; what they are is in `compress.numerics.divergence`.

Nothing here imports torch, so that a method can have it among its options.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Term = Literal["forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "cross_entropy"]


@dataclass(frozen=True)
class Criterion:
    """What a student is judged by: terms with weights.

    Attributes:
        weights: above 0, of at least one of the terms; a sum of 1 keeps the size of the gradient.
        beta: share of the teacher in the mixture of the Jensen-Shannon divergence, in ``[0, 1]``.
        temperature: above 0; logits are divided by it for all terms but the cross-entropy.
    """

    weights: Mapping[Term, float] = field(default_factory=lambda: {"forward_kl": 1.0})
    beta: float = 0.5
    temperature: float = 1.0
