"""How far a compressed model is from the one it was made from, on the same text.

More telling than perplexity, which a changed model can keep by chance: the divergence compares the whole
distribution at every position (as llama.cpp's table does), KL(before || after) in nats, in float32.
"""

from typing import final

import torch

from compress.bench.metrics import Metric, Quantity, Stage, Subject
from compress.bench.metrics._documents import document_outputs
from compress.bench.metrics._scoring import compare_logits, generation_scores
from compress.core.measurement import Measurement

DIVERGENCE = Quantity("fidelity.kl", "KL divergence to BEFORE", "nat", "lower")
MEDIAN = Quantity("fidelity.kl_median", "KL divergence, median", "nat", "lower", shown=False)
TAIL = Quantity("fidelity.kl_p99", "KL divergence, 99th percentile", "nat", "lower", shown=False)
LARGEST = Quantity("fidelity.kl_largest", "KL divergence, largest", "nat", "lower", shown=False)
AGREEMENT = Quantity("fidelity.top1", "same first choice as BEFORE", "", "higher")
COSINE = Quantity("fidelity.cosine", "cosine to BEFORE's embedding", "", "higher")

_REFERENCE = "this arm is the reference"
_FEWEST_FOR_TAIL = 1_000
"""A 99th percentile rests on one value in a hundred; below ten of those it says nothing."""


@final
class Fidelity(Metric):
    """Distributions of language models and classifiers, embeddings of encoders."""

    title = "fidelity"
    stage = Stage.SCORING
    quantities = (DIVERGENCE, MEDIAN, TAIL, LARGEST, AGREEMENT, COSINE)

    def measure(self, subject: Subject) -> dict[str, Measurement]:
        """One pass over the text, through both models. Only what applies to the task is given."""
        applies = self._applicable(subject)
        material = subject.given
        if subject.reference is None or material.reason is not None:
            reason = material.reason or _REFERENCE
            return {quantity.name: quantity.missing(reason) for quantity in applies}
        conditions = {"protocol": {**material.protocol, "dtype": subject.options.scoring_dtype}}
        if subject.task.generates:
            scores = generation_scores(subject)
            if scores.reason is not None:
                return {quantity.name: quantity.missing(scores.reason) for quantity in applies}
            weights = [float(count) for count in scores.positions]
            found = _percentiles(torch.cat(scores.by_token))
            for quantity, samples in ((DIVERGENCE, scores.divergence), (AGREEMENT, scores.agreement)):
                found[quantity.name] = quantity.sampled(
                    samples, "mean", weights=weights, conditions=conditions
                )
            return {quantity.name: found[quantity.name] for quantity in applies}
        outputs = document_outputs(subject)
        before, after = torch.stack(outputs.before), torch.stack(outputs.after)
        if before.shape != after.shape:
            reason = f"outputs of {before.shape[-1]} and {after.shape[-1]} numbers cannot be compared"
            return {quantity.name: quantity.missing(reason) for quantity in applies}
        if COSINE in applies:
            cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
            return {COSINE.name: COSINE.sampled(cosine.tolist(), "mean", conditions=conditions)}
        divergence, agrees = compare_logits(before, after)
        return {
            DIVERGENCE.name: DIVERGENCE.sampled(divergence.tolist(), "mean", conditions=conditions),
            AGREEMENT.name: AGREEMENT.sampled(agrees.double().tolist(), "mean", conditions=conditions),
        }

    def _applicable(self, subject: Subject) -> tuple[Quantity, ...]:
        if subject.task.generates:
            return (DIVERGENCE, MEDIAN, TAIL, LARGEST, AGREEMENT)
        if subject.task.name == "feature-extraction":
            return (COSINE,)
        return (DIVERGENCE, AGREEMENT)


def _percentiles(divergence: torch.Tensor) -> dict[str, Measurement]:
    if not bool(torch.isfinite(divergence).all()):
        return {q.name: q.missing("a divergence is NaN or infinite") for q in (MEDIAN, TAIL, LARGEST)}
    count = {"positions": divergence.numel()}
    ordered = divergence.double().sort().values
    tail = (
        TAIL.exact(float(ordered[int(0.99 * (len(ordered) - 1))]), count)
        if len(ordered) >= _FEWEST_FOR_TAIL
        else TAIL.missing(f"{len(ordered)} positions are too few for a 99th percentile")
    )
    return {
        MEDIAN.name: MEDIAN.exact(float(ordered[len(ordered) // 2]), count),
        TAIL.name: tail,
        LARGEST.name: LARGEST.exact(float(ordered[-1]), count),
    }
