"""How fast a prompt is read."""

from typing import final

from compress.bench.metrics import Metric, Quantity, Stage, Subject
from compress.bench.metrics._timing import Shape, prompts_at, timed
from compress.core.measurement import Measurement

RATE = Quantity("prefill.tokens_per_second", "prefill", "token/s", "higher")
SHAPED = Quantity("prefill.*.tokens_per_second", "prefill", "token/s", "higher")


@final
class Prefill(Metric):
    """Prompt tokens a second, over all sequences of the batch.

    Args:
        shape: a further shape, ``8x512``; without one, the experiment's own.
    """

    title = "prefill throughput"
    stage = Stage.TIMING
    quantities: tuple[Quantity, ...] = (RATE, SHAPED)

    def __init__(self, shape: str = "") -> None:
        self._shape = Shape.of(shape) if shape else None
        self.quantities = (SHAPED.of(shape) if shape else RATE,)

    def measure(self, subject: Subject) -> dict[str, Measurement]:
        """Whole prompts, after a warm-up on the same shape."""
        session, prompts = subject.running, prompts_at(subject, self._shape)
        rate = self.quantities[0]
        session.prefill(prompts)
        rates = []
        for _ in range(subject.options.repeats):
            seconds, _ = timed(session, lambda: session.prefill(prompts))
            rates.append(prompts.numel() / seconds)
        shape = {"batch": prompts.shape[0], "prompt": prompts.shape[1]}
        return {rate.name: rate.sampled(rates, "geometric-mean", conditions=shape)}
