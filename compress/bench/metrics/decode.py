"""How fast text is written, token after token, and which share of the memory's bandwidth that takes."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, final

from compress.bench.clock import Timing
from compress.bench.metrics import Quantity, Subject
from compress.bench.metrics._throughput import Throughput, rates_of
from compress.core.measurement import Measurement
from compress.runtimes import Generation, Session

if TYPE_CHECKING:
    from torch import Tensor

_SHARES = (
    Quantity("decode.bandwidth_share", "bandwidth share", "", "neither"),
    Quantity("decode.*.bandwidth_share", "bandwidth share", "", "neither"),
)
"""Bytes of weights that decoding reads a second, over those that a copy reads and writes."""


@final
class Decode(Throughput):
    """New tokens a second, over all sequences of the batch; the prompt's reading is outside the clock."""

    title = "decode throughput"
    quantities = (*rates_of("decode", "token/s"), *_SHARES)

    def iteration(self, subject: Subject, prompts: "Tensor") -> Callable[[], tuple[int, Timing]]:
        """A fixed number of steps from the same prompt."""
        session, steps = subject.running, subject.options.new_tokens

        def write() -> tuple[int, Timing]:
            start = session.prefill(prompts)
            timing, end = subject.clock.time(session, lambda: decoded(session, start, steps))
            return (end.length - start.length) * prompts.shape[0], timing

        return write

    def amount(self, subject: Subject, prompts: "Tensor") -> int:
        """New tokens of all sequences: an output that ends early is no measurement."""
        return subject.options.new_tokens * prompts.shape[0]

    def checked(
        self, subject: Subject, prompts: "Tensor", rates: Sequence[float]
    ) -> tuple[dict[str, Measurement], list[str]]:
        """The bandwidth share, which no rate may bring above what `compress.bench.bandwidth` allows."""
        _, share = self.quantities
        probe, read = subject.probe, subject.running.facts.get("step_bytes")
        if probe is None or read is None:
            reason = "it is not known how many bytes of weights each step reads here"
            return {share.name: share.missing(reason)}, []
        obstacle = probe.obstacle(read)
        if obstacle is not None or not rates:
            return {share.name: share.missing(obstacle or "no rate was measured")}, []
        steps = [rate / prompts.shape[0] for rate in rates]
        excess = probe.excess(read, max(steps))
        subject.observed["copy_bytes_per_second"] = probe.copy_bandwidth
        shares = [read * each / probe.copy_bandwidth for each in steps]
        conditions = self.conditions(subject, prompts)
        found = share.sampled(shares, "geometric-mean", conditions=conditions)
        return {share.name: found}, [] if excess is None else [excess]

    def conditions(self, subject: Subject, prompts: "Tensor") -> dict[str, Any]:
        """Batch, prompt and new tokens."""
        return {"batch": prompts.shape[0], "prompt": prompts.shape[1], "new": subject.options.new_tokens}


def decoded(session: Session, state: Generation, steps: int) -> Generation:
    """A generation after some more steps."""
    for _ in range(steps):
        state = session.decode(state)
    return state
