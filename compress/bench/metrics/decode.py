"""How fast text is written, token after token."""

from typing import final

from compress.bench.metrics import Metric, Quantity, Stage, Subject
from compress.bench.metrics._timing import Shape, prompts_at, timed
from compress.core.measurement import Measurement
from compress.runtimes import Generation, Session

RATE = Quantity("decode.tokens_per_second", "decode", "token/s", "higher")
SHAPED = Quantity("decode.*.tokens_per_second", "decode", "token/s", "higher")


@final
class Decode(Metric):
    """New tokens a second, over all sequences of the batch; the prompt's reading is outside the clock.

    Args:
        shape: a further shape, ``8x512``; without one, the experiment's own.
    """

    title = "decode throughput"
    stage = Stage.TIMING
    quantities: tuple[Quantity, ...] = (RATE, SHAPED)

    def __init__(self, shape: str = "") -> None:
        self._shape = Shape.of(shape) if shape else None
        self.quantities = (SHAPED.of(shape) if shape else RATE,)

    def measure(self, subject: Subject) -> dict[str, Measurement]:
        """A fixed number of steps from the same prompt, after a warm-up on the same shape."""
        session, steps = subject.running, subject.options.new_tokens
        prompts, rate = prompts_at(subject, self._shape), self.quantities[0]
        decoded(session, session.prefill(prompts), steps)
        rates = []
        for _ in range(subject.options.repeats):
            start = session.prefill(prompts)
            seconds, end = timed(session, lambda start=start: decoded(session, start, steps))  # type: ignore[misc]
            written = end.length - start.length
            if written != steps:
                return {rate.name: rate.missing(f"wrote {written} tokens instead of {steps}")}
            rates.append(steps * prompts.shape[0] / seconds)
        shape = {"batch": prompts.shape[0], "prompt": prompts.shape[1], "new": steps}
        return {rate.name: rate.sampled(rates, "geometric-mean", conditions=shape)}


def decoded(session: Session, state: Generation, steps: int) -> Generation:
    """A generation after some more steps."""
    for _ in range(steps):
        state = session.decode(state)
    return state
