"""How fast a prompt is read."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

from compress.bench.metrics import Subject
from compress.bench.metrics._throughput import Throughput, rates_of, timed

if TYPE_CHECKING:
    from torch import Tensor


@final
class Prefill(Throughput):
    """Prompt tokens a second, over all sequences of the batch."""

    title = "prefill throughput"
    quantities = rates_of("prefill", "token/s")

    def iteration(self, subject: Subject, prompts: "Tensor") -> Callable[[], tuple[int, float]]:
        """One reading of whole prompts."""
        session = subject.running

        def read() -> tuple[int, float]:
            seconds, state = timed(session, lambda: session.prefill(prompts))
            return state.length * prompts.shape[0], seconds

        return read

    def amount(self, subject: Subject, prompts: "Tensor") -> int:
        """All tokens of the prompts."""
        return prompts.numel()

    def conditions(self, subject: Subject, prompts: "Tensor") -> dict[str, Any]:
        """Batch and prompt."""
        return {"batch": prompts.shape[0], "prompt": prompts.shape[1]}
