"""How fast text is written, token after token."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

from compress.bench.metrics import Subject
from compress.bench.metrics._throughput import Throughput, rates_of, timed
from compress.runtimes import Generation, Session

if TYPE_CHECKING:
    from torch import Tensor


@final
class Decode(Throughput):
    """New tokens a second, over all sequences of the batch; the prompt's reading is outside the clock."""

    title = "decode throughput"
    quantities = rates_of("decode", "token/s")

    def iteration(self, subject: Subject, prompts: "Tensor") -> Callable[[], tuple[int, float]]:
        """A fixed number of steps from the same prompt."""
        session, steps = subject.running, subject.options.new_tokens

        def write() -> tuple[int, float]:
            start = session.prefill(prompts)
            seconds, end = timed(session, lambda: decoded(session, start, steps))
            return (end.length - start.length) * prompts.shape[0], seconds

        return write

    def amount(self, subject: Subject, prompts: "Tensor") -> int:
        """New tokens of all sequences: an output that ends early is no measurement."""
        return subject.options.new_tokens * prompts.shape[0]

    def conditions(self, subject: Subject, prompts: "Tensor") -> dict[str, Any]:
        """Batch, prompt and new tokens."""
        return {"batch": prompts.shape[0], "prompt": prompts.shape[1], "new": subject.options.new_tokens}


def decoded(session: Session, state: Generation, steps: int) -> Generation:
    """A generation after some more steps."""
    for _ in range(steps):
        state = session.decode(state)
    return state
