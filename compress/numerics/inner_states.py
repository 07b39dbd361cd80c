"""How far what a student computes on its way is from what its teacher computes there.

=============  ==============================================================================================
hidden states  of one layer each, ``||H_S W - H_T||^2``, as in equation 8 of TinyBERT (Jiao et al. 2020,
               arXiv 1909.10351), or one minus their cosine, as in section 2 of DistilBERT (Sanh et al. 2019,
               arXiv 1910.01108)
scores         ``Q K^T / sqrt(d)`` of each head, before the softmax, equation 7 of TinyBERT
relations      ``softmax(A A^T / sqrt(d_r))`` for queries, keys or values A cut into so many heads that both
               models have the same number, whatever their own are: equations 3 to 6 of MiniLMv2 (Wang et al.
               2021, arXiv 2012.15828), compared by their divergence
=============  ==============================================================================================

All give one number a sequence, a mean over its positions, so that sequences of any length count alike. They
can be differentiated; everything is computed in float32, or in float64 where that comes in.
"""

import math
from typing import Literal

import torch

Distance = Literal["relative", "mse", "cosine"]


def apart(
    ours: torch.Tensor, theirs: torch.Tensor, counted: torch.Tensor, distance: Distance
) -> torch.Tensor:
    """The distance of hidden states, ``[batch]``.

    Args:
        ours, theirs: ``[batch, length, width]``.
        counted: bool ``[batch, length]``, false where there is padding; at least one in each sequence.
        distance: ``mse`` is the mean square of the difference, ``relative`` the square of the difference as
            a share of the teacher's square, which is the same whatever the scale of a model's states, and
            ``cosine`` one minus the cosine.
    """
    ours, theirs = _wide(ours), _wide(theirs)
    if distance == "cosine":
        return _mean(1.0 - torch.cosine_similarity(ours, theirs, dim=-1), counted)
    squares = _mean((ours - theirs).square().mean(-1), counted)
    if distance == "mse":
        return squares
    return squares / _mean(theirs.square().mean(-1), counted).clamp_min(1e-30)


def visible(documents: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """Which position is compared with which, bool ``[batch, length, length]``: those of the same document
    and, in a causal model, no later ones. Each is compared with itself, so that no row is empty.

    Args:
        documents: int64 ``[batch, length]``, the number of the document that a position belongs to.
    """
    length = documents.shape[1]
    pairs = documents[:, None, :] == documents[:, :, None]
    if causal:
        pairs = pairs & torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return pairs | torch.eye(length, dtype=torch.bool, device=documents.device)


def relation_divergence(
    ours: torch.Tensor, theirs: torch.Tensor, heads: int, counted: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """``KL(teacher's relations || student's)`` in nats, the mean over heads and positions, ``[batch]``.

    Args:
        ours, theirs: queries, keys or values of all heads side by side, ``[batch, length, width]``; the
            widths may differ, and ``heads`` divides both.
        heads: relation heads.
        counted: bool ``[batch, length]``.
        seen: bool ``[batch, length, length]``, of `visible`.
    """
    wanted, found = _relations(theirs, heads, seen), _relations(ours, heads, seen)
    terms = torch.where(seen[:, None], wanted.exp() * (wanted - found), 0.0)
    return _mean(terms.sum(-1).mean(1), counted)


def score_distance(
    ours: torch.Tensor, theirs: torch.Tensor, counted: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """Mean square of the difference of attention scores, over heads and pairs of positions, ``[batch]``.

    Args:
        ours, theirs: ``[batch, heads, length, length]``.
        counted, seen: as in `relation_divergence`.
    """
    pairs = (seen & counted[:, :, None])[:, None]
    squares = torch.where(pairs, (_wide(ours) - _wide(theirs)).square(), 0.0)
    return squares.sum((1, 2, 3)) / (ours.shape[1] * pairs.sum((1, 2, 3)))


def scores(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention scores before mask and softmax, ``[batch, heads, length, length]``.

    Args:
        queries: ``[batch, heads, length, width]``.
        keys: the same, or fewer heads, each of which serves as many neighbouring ones of the queries.
        scale: what products are multiplied by.
    """
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    return _wide(queries) @ _wide(keys).transpose(-1, -2) * scale


def _relations(states: torch.Tensor, heads: int, seen: torch.Tensor) -> torch.Tensor:
    """Logarithms, ``[batch, heads, length, length]``."""
    wide = _wide(states)
    parts = wide.reshape(*wide.shape[:-1], heads, -1).transpose(1, 2)
    products = parts @ parts.transpose(-1, -2) / math.sqrt(parts.shape[-1])
    return products.masked_fill(~seen[:, None], -torch.inf).log_softmax(-1)


def _mean(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The mean of ``[batch, length]`` over what is counted."""
    return torch.where(counted, values, 0.0).sum(1) / counted.sum(1)


def _wide(states: torch.Tensor) -> torch.Tensor:
    return states if states.dtype == torch.float64 else states.float()
