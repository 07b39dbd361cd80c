"""How fast a prompt is read."""

from typing import final

from compress.bench.metrics import Metric, Quantity, Stage, Subject
from compress.bench.metrics._timing import timed
from compress.core.measurement import Measurement

RATE = Quantity("prefill.tokens_per_second", "prefill", "token/s", "higher")


@final
class Prefill(Metric):
    """Prompt tokens a second, over all sequences of the batch."""

    title = "prefill throughput"
    stage = Stage.TIMING
    quantities = (RATE,)

    def measure(self, subject: Subject) -> dict[str, Measurement]:
        """Whole prompts, after a warm-up on the same shape."""
        session, prompts = subject.running, subject.given.prompts
        session.prefill(prompts)
        rates = []
        for _ in range(subject.options.repeats):
            seconds, _ = timed(session, lambda: session.prefill(prompts))
            rates.append(prompts.numel() / seconds)
        shape = {"batch": prompts.shape[0], "prompt": prompts.shape[1]}
        return {RATE.name: RATE.sampled(rates, "geometric-mean", conditions=shape)}
