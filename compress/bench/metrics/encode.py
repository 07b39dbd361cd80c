"""How fast an encoder or a classifier takes texts in."""

from typing import final

from compress.bench.metrics import Metric, Quantity, Stage, Subject
from compress.bench.metrics._timing import timed
from compress.core.measurement import Measurement

RATE = Quantity("encode.sequences_per_second", "encode", "sequence/s", "higher")


@final
class Encode(Metric):
    """Sequences a second, all of the same length."""

    title = "encoding throughput"
    stage = Stage.TIMING
    quantities = (RATE,)

    def measure(self, subject: Subject) -> dict[str, Measurement]:
        """Whole batches, after a warm-up on the same shape."""
        session, prompts = subject.running, subject.given.prompts
        session.outputs(prompts)
        rates = []
        for _ in range(subject.options.repeats):
            seconds, _ = timed(session, lambda: session.outputs(prompts))
            rates.append(prompts.shape[0] / seconds)
        shape = {"batch": prompts.shape[0], "length": prompts.shape[1]}
        return {RATE.name: RATE.sampled(rates, "geometric-mean", conditions=shape)}
