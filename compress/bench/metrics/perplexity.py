"""How well a language model predicts a text, always with the protocol under which that holds.

The text's perplexity is ``exp(mean nats a target)``, each target weighing the same (Jelinek et al. 1977).
There are many conventions for windows, joins and first tokens, and they differ by more than a compression
does; the protocol travels with the value, and two protocols are never compared.
"""

from typing import final

from compress.bench.metrics import Metric, Quantity, Stage, Subject
from compress.bench.metrics._scoring import generation_scores
from compress.core.measurement import Measurement

PERPLEXITY = Quantity("perplexity", "perplexity", "", "lower")


@final
class Perplexity(Metric):
    """Samples are nats a target of each window or document, weighted by its targets."""

    title = "perplexity"
    stage = Stage.SCORING
    quantities = (PERPLEXITY,)

    def measure(self, subject: Subject) -> dict[str, Measurement]:
        """One pass over the text."""
        material = subject.given
        if material.reason is not None:
            return self.missing(material.reason)
        scores = generation_scores(subject)
        protocol = {
            **material.protocol,
            "targets": sum(scores.targets),
            "dtype": subject.options.scoring_dtype,
        }
        measured = PERPLEXITY.sampled(
            scores.loss, "exponential-mean", weights=scores.targets, conditions={"protocol": protocol}
        )
        return {PERPLEXITY.name: measured}
