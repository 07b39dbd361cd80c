"""How long it takes to bring a model into memory, in a fresh process, libraries already imported."""

from typing import final

from compress.bench.metrics import Metric, Quantity, Stage, Subject
from compress.core.measurement import Measurement

SECONDS = Quantity("load.seconds", "load time", "s", "lower")


@final
class Load(Metric):
    """From the folder to a model that can answer. Files may be in the system's cache."""

    title = "load time"
    stage = Stage.TIMING
    quantities = (SECONDS,)

    def measure(self, subject: Subject) -> dict[str, Measurement]:
        """One sample a launch."""
        return {SECONDS.name: SECONDS.sampled([subject.load_seconds], "geometric-mean")}
