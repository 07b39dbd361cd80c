"""How fast an encoder or a classifier takes texts in."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

from compress.bench.metrics import Subject
from compress.bench.metrics._throughput import Throughput, rates_of, timed

if TYPE_CHECKING:
    from torch import Tensor


@final
class Encode(Throughput):
    """Sequences a second, all of the same length."""

    title = "encoding throughput"
    quantities = rates_of("encode", "sequence/s")

    def iteration(self, subject: Subject, prompts: "Tensor") -> Callable[[], tuple[int, float]]:
        """One whole batch."""
        session = subject.running

        def take_in() -> tuple[int, float]:
            seconds, outputs = timed(session, lambda: session.outputs(prompts))
            return outputs.shape[0], seconds

        return take_in

    def amount(self, subject: Subject, prompts: "Tensor") -> int:
        """Sequences of the batch."""
        return prompts.shape[0]

    def conditions(self, subject: Subject, prompts: "Tensor") -> dict[str, Any]:
        """Batch and length."""
        return {"batch": prompts.shape[0], "length": prompts.shape[1]}
