"""One pass over the text: likelihood of the text and distance to the reference, in float32.

Perplexity and fidelity read the same pass, so a text is run through each model once.
"""

from dataclasses import dataclass, field
from typing import Final

import torch

from compress.bench.metrics import Subject

_LOGIT_BYTES: Final = 2**28
"""Logits of one forward pass that are wanted at once; a single sequence may take more."""
_POSITIONS: Final = 256
"""Positions whose distributions are compared at once."""


@dataclass
class Scores:
    """Per sequence, in the order of the material.

    Attributes:
        loss: mean nats a target.
        targets: how many.
        divergence: mean KL(before || after) a position, nats; empty without a reference.
        agreement: share of positions where both prefer the same token; empty without a reference.
        positions: compared positions of each sequence.
        by_token: every position's divergence, of all sequences.
        reason: why there is no comparison although there is a reference.
    """

    loss: list[float] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    by_token: list[torch.Tensor] = field(default_factory=list)
    reason: str | None = None


def generation_scores(subject: Subject) -> Scores:
    """The scores of a causal language model, computed once for a subject."""
    if "generation" not in subject.memo:
        subject.memo["generation"] = _score(subject)
    scores: Scores = subject.memo["generation"]
    return scores


def _score(subject: Subject) -> Scores:
    material, session, reference = subject.given, subject.running, subject.reference
    count = len(material.sequences)
    scores = Scores(loss=[0.0] * count, targets=[0] * count)
    if reference is not None:
        scores.divergence, scores.agreement = [0.0] * count, [0.0] * count
        scores.positions, scores.by_token = [0] * count, [torch.empty(0)] * count
    vocabulary = int(subject.artifact.config.get("vocab_size") or 0)
    longest = max((len(sequence) for sequence in material.sequences), default=1)
    fitting = _LOGIT_BYTES // max(4 * vocabulary * longest, 1)
    for numbers in material.batches(max(1, min(subject.options.scoring_batch_size, fitting))):
        tokens = torch.stack([material.sequences[number] for number in numbers])
        after = session.outputs(tokens)
        before = reference.outputs(tokens).to(after.device) if reference is not None else None
        if before is not None and before.shape != after.shape:
            shapes = f"{before.shape[-1]} and {after.shape[-1]}"
            scores.reason = f"the vocabularies differ: {shapes} logits a token"
            before = None
        for row, number in enumerate(numbers):
            loss = _loss(after[row], tokens[row].to(after.device))
            scores.loss[number], scores.targets[number] = loss, len(tokens[row]) - 1
            if before is not None:
                divergence, agrees = compare_logits(before[row], after[row])
                scores.divergence[number] = float(divergence.double().mean())
                scores.agreement[number] = float(agrees.double().mean())
                scores.positions[number] = len(divergence)
                scores.by_token[number] = divergence.cpu()
    return scores


def _loss(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Mean nats of each token given those before it; ``[length, vocabulary]`` and ``[length]``."""
    total = 0.0
    for start in range(0, len(tokens) - 1, _POSITIONS):
        part = logits[start : min(start + _POSITIONS, len(tokens) - 1)]
        wanted = tokens[start + 1 : start + 1 + len(part)]
        loss = torch.nn.functional.cross_entropy(part.float(), wanted, reduction="none")
        total += float(loss.double().sum())
    return total / (len(tokens) - 1)


def compare_logits(before: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(before || after) in nats, and whether the most likely choice is the same, position by position.

    Args:
        before, after: logits ``[positions, choices]``; compared in float32.

    Returns:
        float32 ``[positions]`` and bool ``[positions]``.
    """
    divergences, agreements = [], []
    for old, new in zip(before.split(_POSITIONS), after.split(_POSITIONS), strict=True):
        p, q = old.float().log_softmax(-1), new.float().log_softmax(-1)
        # Terms of opposite sign cancel; what float32 leaves below zero is rounding.
        divergences.append((p.exp() * (p - q)).sum(-1).clamp_min(0.0))
        agreements.append(old.argmax(-1) == new.argmax(-1))
    return torch.cat(divergences), torch.cat(agreements)
