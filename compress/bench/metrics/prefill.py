"""How fast a prompt is read."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, final

from compress.bench.clock import Timing
from compress.bench.metrics import Subject
from compress.bench.metrics._throughput import Throughput, rates_of
from compress.core.measurement import Measurement

if TYPE_CHECKING:
    from torch import Tensor


@final
class Prefill(Throughput):
    """Prompt tokens a second, over all sequences of the batch."""

    title = "prefill throughput"
    quantities = rates_of("prefill", "token/s")

    def iteration(self, subject: Subject, prompts: "Tensor") -> Callable[[], tuple[int, Timing]]:
        """One reading of whole prompts."""
        session = subject.running

        def read() -> tuple[int, Timing]:
            timing, state = subject.clock.time(session, lambda: session.prefill(prompts))
            return state.length * prompts.shape[0], timing

        return read

    def amount(self, subject: Subject, prompts: "Tensor") -> int:
        """All tokens of the prompts."""
        return prompts.numel()

    def checked(
        self, subject: Subject, prompts: "Tensor", rates: Sequence[float]
    ) -> tuple[dict[str, Measurement], list[str]]:
        """A prompt reads each weight once for all its tokens: arithmetic is its limit, which is not known."""
        return {}, []

    def conditions(self, subject: Subject, prompts: "Tensor") -> dict[str, Any]:
        """Batch and prompt."""
        return {"batch": prompts.shape[0], "prompt": prompts.shape[1]}
