"""How fast an encoder or a classifier takes texts in."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, final

from compress.bench.clock import Timing
from compress.bench.metrics import Subject
from compress.bench.metrics._throughput import Throughput, rates_of
from compress.core.measurement import Measurement

if TYPE_CHECKING:
    from torch import Tensor


@final
class Encode(Throughput):
    """Sequences a second, all of the same length."""

    title = "encoding throughput"
    quantities = rates_of("encode", "sequence/s")

    def iteration(self, subject: Subject, prompts: "Tensor") -> Callable[[], tuple[int, Timing]]:
        """One whole batch."""
        session = subject.running

        def take_in() -> tuple[int, Timing]:
            timing, outputs = subject.clock.time(session, lambda: session.outputs(prompts))
            return outputs.shape[0], timing

        return take_in

    def amount(self, subject: Subject, prompts: "Tensor") -> int:
        """Sequences of the batch."""
        return prompts.shape[0]

    def checked(
        self, subject: Subject, prompts: "Tensor", rates: Sequence[float]
    ) -> tuple[dict[str, Measurement], list[str]]:
        """As for a prompt, arithmetic is the limit, which is not known."""
        return {}, []

    def conditions(self, subject: Subject, prompts: "Tensor") -> dict[str, Any]:
        """Batch and length."""
        return {"batch": prompts.shape[0], "length": prompts.shape[1]}
