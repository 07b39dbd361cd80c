"""How often a classifier chooses the right label."""

from typing import final

from compress.bench.metrics import Metric, Quantity, Stage, Subject
from compress.bench.metrics._documents import document_outputs
from compress.core.measurement import Measurement

ACCURACY = Quantity("accuracy", "accuracy", "", "higher")


@final
class Accuracy(Metric):
    """Share of labelled documents; a sample a document, 1 or 0."""

    title = "classification accuracy"
    stage = Stage.SCORING
    quantities = (ACCURACY,)

    def measure(self, subject: Subject) -> dict[str, Measurement]:
        """One pass over the documents."""
        material = subject.given
        if material.reason is not None:
            return self.missing(material.reason)
        if material.labels is None:
            return self.missing("the text has no labels; give JSON lines or a table with text and label")
        chosen = [int(output.argmax()) for output in document_outputs(subject).after]
        right = [float(a == b) for a, b in zip(chosen, material.labels, strict=True)]
        protocol = {**material.protocol, "dtype": subject.options.scoring_dtype}
        return {ACCURACY.name: ACCURACY.sampled(right, "mean", conditions={"protocol": protocol})}
