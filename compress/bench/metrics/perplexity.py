"""How well a language model predicts a text, always with the protocol under which that holds.

The text's perplexity is ``exp(mean nats a target)``, each target weighing the same (Jelinek et al. 1977).
There are many conventions for windows, joins and first tokens (`compress.bench.protocols`), and they differ
by more than a compression does; the protocol travels with the value, and two protocols are never compared.
"""

import math
from typing import final

from compress.bench.metrics import Metric, Quantity, Stage, Subject
from compress.bench.metrics._scoring import generation_scores
from compress.core.measurement import Measurement

PERPLEXITY = Quantity("perplexity", "perplexity", "", "lower")
WORD = Quantity("perplexity.word", "perplexity of a word", "", "lower")
BYTE = Quantity("perplexity.byte", "perplexity of a byte", "", "lower")
BITS = Quantity("perplexity.bits_per_byte", "bits a byte", "bit/byte", "lower")


@final
class Perplexity(Metric):
    """Samples are nats a target of each window or document, weighted by its targets.

    Under the protocol ``lm-eval`` also nats a word, nats a byte and bits a byte, weighted by words and bytes.
    Those of a document are shared out among its windows by their targets, so that every sum is exact.
    """

    title = "perplexity"
    stage = Stage.SCORING
    quantities = (PERPLEXITY, WORD, BYTE, BITS)

    def measure(self, subject: Subject) -> dict[str, Measurement]:
        """One pass over the text."""
        material = subject.given
        if material.reason is not None:
            return self.missing(material.reason)
        scores = generation_scores(subject)
        conditions = {"protocol": {**material.protocol, "dtype": subject.options.scoring_dtype}}
        found = {
            PERPLEXITY.name: PERPLEXITY.sampled(
                scores.mean_loss,
                "exponential-mean",
                weights=scores.targets,
                clusters=material.clusters,
                conditions=conditions,
            )
        }
        if material.words is None or material.bytes is None:
            reason = f"protocol '{material.protocol.get('kind')}' counts no words and bytes, 'lm-eval' does"
            return found | {quantity.name: quantity.missing(reason) for quantity in (WORD, BYTE, BITS)}
        sums = [float(loss.sum()) for loss in scores.loss]
        for quantity, counts in ((WORD, material.words), (BYTE, material.bytes), (BITS, material.bytes)):
            unit = math.log(2) if quantity is BITS else 1.0
            found[quantity.name] = quantity.sampled(
                [total / (count * unit) for total, count in zip(sums, counts, strict=True)],
                "mean" if quantity is BITS else "exponential-mean",
                weights=counts,
                clusters=material.clusters,
                conditions=conditions,
            )
        return found
