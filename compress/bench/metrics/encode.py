"""How fast an encoder or a classifier takes texts in."""

from typing import final

from compress.bench.metrics import Metric, Quantity, Stage, Subject
from compress.bench.metrics._timing import Shape, prompts_at, timed
from compress.core.measurement import Measurement

RATE = Quantity("encode.sequences_per_second", "encode", "sequence/s", "higher")
SHAPED = Quantity("encode.*.sequences_per_second", "encode", "sequence/s", "higher")


@final
class Encode(Metric):
    """Sequences a second, all of the same length.

    Args:
        shape: a further shape, ``8x512``; without one, the experiment's own.
    """

    title = "encoding throughput"
    stage = Stage.TIMING
    quantities: tuple[Quantity, ...] = (RATE, SHAPED)

    def __init__(self, shape: str = "") -> None:
        self._shape = Shape.of(shape) if shape else None
        self.quantities = (SHAPED.of(shape) if shape else RATE,)

    def measure(self, subject: Subject) -> dict[str, Measurement]:
        """Whole batches, after a warm-up on the same shape."""
        session, prompts = subject.running, prompts_at(subject, self._shape)
        rate = self.quantities[0]
        session.outputs(prompts)
        rates = []
        for _ in range(subject.options.repeats):
            seconds, _ = timed(session, lambda: session.outputs(prompts))
            rates.append(prompts.shape[0] / seconds)
        shape = {"batch": prompts.shape[0], "length": prompts.shape[1]}
        return {rate.name: rate.sampled(rates, "geometric-mean", conditions=shape)}
