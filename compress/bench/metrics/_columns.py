"""What one pass over examples gave for one quantity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.bench.metrics import Quantity
from compress.core.measurement import Measurement, Summary


@dataclass(frozen=True)
class Column:
    """The samples of one quantity, or why there are none.

    Attributes:
        quantity: what was measured.
        samples: one an example.
        summary: how they become one value.
        weights: of the samples, or none.
        answers: what was answered to each example, where an answer is right or wrong by this quantity.
        reason: why there are no samples.
    """

    quantity: Quantity
    samples: Sequence[float] = ()
    summary: Summary = "mean"
    weights: Sequence[float] | None = None
    answers: Sequence[str] | None = None
    reason: str | None = None

    def measurement(self, protocol: Mapping[str, Any], *, complete: bool) -> Measurement:
        """As a report has it.

        Args:
            protocol: the rules under which the examples were done.
            complete: whether these were all the examples that there are.
        """
        if self.reason is not None:
            return self.quantity.missing(self.reason)
        return self.quantity.sampled(
            self.samples,
            self.summary,
            weights=self.weights,
            answers=self.answers,
            conditions={"protocol": protocol},
            complete=complete,
        )
