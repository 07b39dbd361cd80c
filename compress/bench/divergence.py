"""How far one distribution over tokens is from another: Kullback and Leibler's divergence, in nats.

The exact form needs both models' logits at once. The other form keeps of the first model its k most likely
tokens at each position and puts all others into one bucket (`compress.numerics.buckets`): a lower bound, and
exact when k is the vocabulary.
"""

import torch

from compress.numerics.buckets import Buckets, rows_at_once


def compare_logits(before: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(before || after) in nats, and whether the most likely choice is the same, position by position.

    Args:
        before, after: logits ``[positions, choices]``; compared in float32.

    Returns:
        float32 ``[positions]`` and bool ``[positions]``.
    """
    divergences, agreements = [], []
    rows = rows_at_once(before)
    for old, new in zip(before.split(rows), after.split(rows), strict=True):
        divergences.append(_divergence(old.float().log_softmax(-1), new.float().log_softmax(-1)))
        agreements.append(old.argmax(-1) == new.argmax(-1))
    return torch.cat(divergences), torch.cat(agreements)


def compare_buckets(before: Buckets, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A lower bound of KL(before || after) in nats, and whether the most likely token is the same.

    Args:
        before: of the reference, on the device of `after`.
        after: logits ``[positions, vocabulary]``.

    Returns:
        float32 ``[positions]`` and bool ``[positions]``.
    """
    divergences = []
    step = rows_at_once(after)
    for at, part in zip(range(0, len(after), step), after.split(step), strict=True):
        old = before.rows(slice(at, at + len(part)))
        divergences.append(_divergence(old.outcomes, old.of(part.float().log_softmax(-1))))
    return torch.cat(divergences), before.first == after.argmax(-1)


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
