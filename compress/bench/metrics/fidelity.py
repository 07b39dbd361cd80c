"""How far a compressed model is from the one it was made from, on the same text.

More telling than perplexity, which a changed model can keep by chance: the divergence compares the whole
distribution at every position that predicts a target (as llama.cpp's table does), KL(before || after) in
nats, in float32. Percentiles are over positions; means are sampled by window or document.
"""

from collections.abc import Mapping
from typing import Final, final

import numpy as np
import torch

from compress.bench.divergence import compare_logits
from compress.bench.metrics import Metric, Quantity, Stage, Subject
from compress.bench.metrics._documents import document_outputs
from compress.bench.metrics._scoring import Scores, generation_scores
from compress.core.measurement import Measurement

DIVERGENCE = Quantity("fidelity.kl", "KL divergence to BEFORE", "nat", "lower")
LARGEST = Quantity("fidelity.kl_largest", "KL divergence, largest", "nat", "lower", shown=False)
AGREEMENT = Quantity("fidelity.top1", "same first choice as BEFORE", "", "higher")
CHANGE = Quantity("fidelity.delta_p", "change of the text's probability", "", "higher", shown=False)
CHANGE_SIZE = Quantity(
    "fidelity.delta_p_rms", "change of the text's probability, root mean square", "", "lower", shown=False
)
LOG_RATIO = Quantity(
    "fidelity.log_ppl_ratio", "logarithm of the perplexities' ratio", "nat", "lower", shown=False
)
COSINE = Quantity("fidelity.cosine", "cosine to BEFORE's embedding", "", "higher")

_PERCENTILES: Final = {
    500: Quantity("fidelity.kl_median", "KL divergence, median", "nat", "lower", shown=False),
    900: Quantity("fidelity.kl_p90", "KL divergence, 90th percentile", "nat", "lower", shown=False),
    950: Quantity("fidelity.kl_p95", "KL divergence, 95th percentile", "nat", "lower", shown=False),
    990: Quantity("fidelity.kl_p99", "KL divergence, 99th percentile", "nat", "lower", shown=False),
    999: Quantity("fidelity.kl_p99_9", "KL divergence, 99.9th percentile", "nat", "lower", shown=False),
}
"""By the share of positions below, in thousandths."""
_FEWEST_BEYOND: Final = 10
"""A percentile rests on the values beyond it; on fewer it says little."""
_REFERENCE: Final = "this arm is the reference"
_OF_TEXT: Final = (DIVERGENCE, *_PERCENTILES.values(), LARGEST, AGREEMENT, CHANGE, CHANGE_SIZE, LOG_RATIO)


@final
class Fidelity(Metric):
    """Distributions of language models and classifiers, embeddings of encoders."""

    title = "fidelity"
    stage = Stage.SCORING
    quantities = (*_OF_TEXT, COSINE)

    def measure(self, subject: Subject) -> dict[str, Measurement]:
        """One pass over the text, through both models. Only what applies to the task is given."""
        applies = self._applicable(subject)
        material = subject.given
        if (subject.reference is None and subject.stored is None) or material.reason is not None:
            reason = material.reason or _REFERENCE
            return {quantity.name: quantity.missing(reason) for quantity in applies}
        if subject.task.generates:
            scores = generation_scores(subject)
            if scores.reason is not None:
                return {quantity.name: quantity.missing(scores.reason) for quantity in applies}
            return _of_text(subject, scores)
        conditions = {"protocol": {**material.protocol, "dtype": subject.options.scoring_dtype}}
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
            return _OF_TEXT
        if subject.task.name == "feature-extraction":
            return (COSINE,)
        return (DIVERGENCE, AGREEMENT)


def _of_text(subject: Subject, scores: Scores) -> dict[str, Measurement]:
    material = subject.given
    conditions = {"protocol": {**material.protocol, "dtype": subject.options.scoring_dtype}}
    # A bound and the divergence itself are two things, and their conditions keep them apart.
    form = (
        "exact" if scores.kept is None else f"lower bound: {scores.kept} likeliest tokens and the rest as one"
    )
    of_divergence = {**conditions, "divergence": form}
    changes = [
        torch.exp(-loss) - torch.exp(-other.loss)
        for loss, other in zip(scores.loss, scores.compared, strict=True)
    ]
    ratios = [loss - other.loss for loss, other in zip(scores.loss, scores.compared, strict=True)]
    weights = [float(count) for count in scores.targets]
    found = _percentiles(torch.cat([each.divergence for each in scores.compared]), of_divergence)
    for quantity, columns, held in (
        (DIVERGENCE, [each.divergence for each in scores.compared], of_divergence),
        (AGREEMENT, [each.agrees for each in scores.compared], conditions),
        (CHANGE, changes, conditions),
        (CHANGE_SIZE, [change.square() for change in changes], conditions),
        (LOG_RATIO, ratios, conditions),
    ):
        found[quantity.name] = quantity.sampled(
            [float(column.double().mean()) for column in columns],
            "root-mean" if quantity is CHANGE_SIZE else "mean",
            weights=weights,
            clusters=material.clusters,
            conditions=held,
        )
    return {quantity.name: found[quantity.name] for quantity in _OF_TEXT}


def _percentiles(divergence: torch.Tensor, conditions: Mapping[str, object]) -> dict[str, Measurement]:
    """Percentiles over positions, between two values in proportion, and the largest."""
    quantities = (*_PERCENTILES.values(), LARGEST)
    if not bool(torch.isfinite(divergence).all()):
        return {q.name: q.missing("a divergence is NaN or infinite") for q in quantities}
    count = len(divergence)
    held = {**conditions, "positions": count}
    values = divergence.double().numpy()
    found = {LARGEST.name: LARGEST.exact(float(values.max()), held)}
    for share, quantity in _PERCENTILES.items():
        beyond = count * (1000 - share) // 1000
        if beyond < _FEWEST_BEYOND:
            name = quantity.title.rpartition(", ")[2]
            reason = f"{count} positions are too few for a {name}: {beyond} lie beyond it"
            found[quantity.name] = quantity.missing(reason)
        else:
            found[quantity.name] = quantity.exact(float(np.percentile(values, share / 10)), held)
    return found
