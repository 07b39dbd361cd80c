"""One pass over the text: likelihood of the text and distance to the reference, in float32.

Perplexity and fidelity read the same pass, so a text is run through each model once. Both look at the same
positions: those that predict a target of the protocol.
"""

from dataclasses import dataclass, field
from typing import Final

import torch

from compress.bench.divergence import compare_buckets, compare_logits
from compress.bench.metrics import Subject

_LOGIT_BYTES: Final = 2**28
"""Logits of one forward pass that are wanted at once; a single sequence may take more."""
_POSITIONS: Final = 256
"""Positions whose likelihood is found at once."""


@dataclass(frozen=True)
class Compared:
    """One sequence beside the reference, on the CPU, a number for each target.

    Attributes:
        divergence: KL(before || after) where the target is predicted, nats; a lower bound of it where the
            reference was read from a file.
        agrees: whether both prefer the same token there.
        loss: of the reference, nats.
    """

    divergence: torch.Tensor
    agrees: torch.Tensor
    loss: torch.Tensor


@dataclass
class Scores:
    """Per sequence, in the order of the material.

    Attributes:
        loss: nats of each target, float64 ``[targets]``.
        compared: with the reference; empty without one.
        kept: tokens of each position that the reference is known by; none for all of them.
        reason: why there is no comparison although there is a reference.
    """

    loss: list[torch.Tensor] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list)
    kept: int | None = None
    reason: str | None = None

    @property
    def targets(self) -> list[int]:
        """Of each sequence."""
        return [len(loss) for loss in self.loss]

    @property
    def mean_loss(self) -> list[float]:
        """Of each sequence, nats a target."""
        return [float(loss.mean()) for loss in self.loss]


def generation_scores(subject: Subject) -> Scores:
    """The scores of a causal language model, computed once for a subject."""
    if "generation" not in subject.memo:
        subject.memo["generation"] = _score(subject)
    scores: Scores = subject.memo["generation"]
    return scores


def _score(subject: Subject) -> Scores:
    material, session = subject.given, subject.running
    scores = Scores(loss=[torch.empty(0)] * len(material.sequences))
    compared: dict[int, Compared] = {}
    vocabulary = int(subject.artifact.config.get("vocab_size") or 0)
    longest = max((len(sequence) for sequence in material.sequences), default=1)
    fitting = _LOGIT_BYTES // max(4 * vocabulary * longest, 1)
    for numbers in material.batches(max(1, min(subject.options.scoring_batch_size, fitting))):
        # Nothing is predicted from the last token, for which a model may have no position left.
        tokens = torch.stack([material.sequences[number] for number in numbers])
        after = session.outputs(tokens[:, :-1])
        before = subject.reference.outputs(tokens[:, :-1]) if subject.reference is not None else None
        for row, number in enumerate(numbers):
            start = material.starts[number]
            wanted = tokens[row, start:].to(after.device)
            logits = after[row, start - 1 :]
            loss = _loss(logits, wanted)
            scores.loss[number] = loss.double().cpu()
            if subject.recorder is not None:
                subject.recorder.add(number, logits, loss)
            if before is not None:
                compared[number] = _beside(before[row, start - 1 :].to(logits.device), logits, wanted, scores)
            elif subject.stored is not None:
                compared[number] = _beside_stored(subject, number, logits, scores)
    if scores.reason is None:
        scores.compared = [compared[number] for number in sorted(compared)]
    return scores


def _beside(before: torch.Tensor, after: torch.Tensor, wanted: torch.Tensor, scores: Scores) -> Compared:
    if not _same_vocabulary(before.shape[-1], after, scores):
        return _NOTHING
    divergence, agrees = compare_logits(before, after)
    return Compared(divergence.cpu(), agrees.cpu(), _loss(before, wanted).double().cpu())


def _beside_stored(subject: Subject, number: int, after: torch.Tensor, scores: Scores) -> Compared:
    stored = subject.stored
    if stored is None or not _same_vocabulary(stored.vocabulary, after, scores):
        return _NOTHING
    scores.kept = stored.most
    before, log_probabilities = stored.parts[number]
    divergence, agrees = compare_buckets(before.to(after.device), after)
    return Compared(divergence.cpu(), agrees.cpu(), -log_probabilities.double())


_NOTHING: Final = Compared(torch.empty(0), torch.empty(0, dtype=torch.bool), torch.empty(0))


def _same_vocabulary(before: int, after: torch.Tensor, scores: Scores) -> bool:
    if before != after.shape[-1]:
        scores.reason = f"the vocabularies differ: {before} and {after.shape[-1]} logits a token"
    return scores.reason is None


def _loss(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Nats of each token, float32 ``[targets]``; from logits ``[targets, vocabulary]`` and ``[targets]``."""
    return torch.cat(
        [
            torch.nn.functional.cross_entropy(part.float(), tokens, reduction="none")
            for part, tokens in zip(logits.split(_POSITIONS), wanted.split(_POSITIONS), strict=True)
        ]
    )
