"""How far one distribution over tokens is from another: Kullback and Leibler's divergence, in nats.

The exact form needs both models' logits at once. The other form keeps of the first model its k most likely
tokens at each position and puts all others into one bucket, the tail. Putting outcomes together can only
make a divergence smaller (data processing; by the log sum inequality, Cover and Thomas 2006, "Elements of
Information Theory", theorem 2.7.1), so that it is a lower bound, and exact when k is the vocabulary.
"""

from dataclasses import dataclass
from typing import Final

import torch

_NUMBERS: Final = 2**23
"""Of each distribution that are compared at once."""


@dataclass(frozen=True)
class Buckets:
    """The most likely tokens of a model at each position, and all others as one.

    Attributes:
        tokens: integers ``[positions, k]``.
        log_probabilities: float32 ``[positions, k]``, nats.
        tail: float32 ``[positions]``, logarithm of what all other tokens share; minus infinity for nothing.
        first: integers ``[positions]``, the most likely token.
    """

    tokens: torch.Tensor
    log_probabilities: torch.Tensor
    tail: torch.Tensor
    first: torch.Tensor


def compare_logits(before: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(before || after) in nats, and whether the most likely choice is the same, position by position.

    Args:
        before, after: logits ``[positions, choices]``; compared in float32.

    Returns:
        float32 ``[positions]`` and bool ``[positions]``.
    """
    divergences, agreements = [], []
    rows = _rows(before)
    for old, new in zip(before.split(rows), after.split(rows), strict=True):
        divergences.append(_divergence(old.float().log_softmax(-1), new.float().log_softmax(-1)))
        agreements.append(old.argmax(-1) == new.argmax(-1))
    return torch.cat(divergences), torch.cat(agreements)


def buckets(logits: torch.Tensor, k: int) -> Buckets:
    """The k most likely tokens of each position and the tail.

    Args:
        logits: ``[positions, vocabulary]``.
        k: at most the vocabulary.
    """
    parts = [_buckets(part, k) for part in logits.split(_rows(logits))]
    return Buckets(
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.log_probabilities for part in parts]),
        torch.cat([part.tail for part in parts]),
        torch.cat([part.first for part in parts]),
    )


def _buckets(logits: torch.Tensor, k: int) -> Buckets:
    distribution = logits.float().log_softmax(-1)
    found = distribution.topk(k, dim=-1)
    return Buckets(found.indices, found.values, _tail(distribution, found.indices), logits.argmax(-1))


def compare_buckets(before: Buckets, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A lower bound of KL(before || after) in nats, and whether the most likely token is the same.

    Args:
        before: of the reference, on the device of `after`.
        after: logits ``[positions, vocabulary]``.

    Returns:
        float32 ``[positions]`` and bool ``[positions]``.
    """
    divergences = []
    step = _rows(after)
    for at, part in zip(range(0, len(after), step), after.split(step), strict=True):
        rows = slice(at, at + len(part))
        distribution = part.float().log_softmax(-1)
        tokens = before.tokens[rows].long()
        new = torch.cat([distribution.gather(-1, tokens), _tail(distribution, tokens)[:, None]], dim=-1)
        old = torch.cat([before.log_probabilities[rows], before.tail[rows, None]], dim=-1)
        divergences.append(_divergence(old, new))
    return torch.cat(divergences), before.first == after.argmax(-1)


def _rows(logits: torch.Tensor) -> int:
    """Positions that are compared at once."""
    return max(1, _NUMBERS // logits.shape[-1])


def _tail(distribution: torch.Tensor, left_out: torch.Tensor) -> torch.Tensor:
    """Logarithm of the probability of all tokens but some: summed, since one minus the others cancels."""
    return distribution.scatter(-1, left_out, -torch.inf).logsumexp(-1)


def _divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL in nats from log-probabilities ``[positions, outcomes]``.

    The sum of ``q - p`` is zero. Adding it makes every term positive, so that nothing cancels, and takes
    the rounding of the logarithms away, which for a small divergence is not small: with it every term is of
    second order in ``p - q``. This needs double precision, the logarithms themselves do not.
    """
    p, q = p.double(), q.double()
    impossible = p.isneginf()
    ratio = torch.where(impossible, 0.0, p - q)
    terms = p.exp() * ratio + (q.exp() - p.exp())
    # What is left below zero is rounding.
    return terms.sum(-1).clamp_min(0.0).float()
