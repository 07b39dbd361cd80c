"""How far a student's next-token distributions are from a teacher's, and the gradient in its logits.

``p`` is the teacher's distribution, ``q`` the student's, ``m = beta p + (1 - beta) q``:

============================  ========================================  ==================================
term                          value                                     gradient in the logarithms of q
============================  ========================================  ==================================
``forward_kl``                ``KL(p || q)``                            ``q - p``
``reverse_kl``                ``R = KL(q || p)``                        ``q (log(q / p) - R)``
``jensen_shannon``            ``beta KL(p || m) + (1 - beta) S``,       ``(1 - beta) q (log(q / m) - S)``
                              ``S = KL(q || m)``
``total_variation``           ``V = sum |q - p| / 2``                   ``q (s - sum q s) / 2``,
                                                                        ``s = sign(q - p)``
``cross_entropy``             ``- log q`` of the token that follows     ``q`` less one at that token
============================  ========================================  ==================================

Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2: both distributions are softened by a temperature
T, and the divergence is multiplied by its square, so that the size of the gradient does not depend on it;
the total variation, which is of first order, is multiplied by T alone. Cross-entropy is of the plain
distribution. The generalised Jensen-Shannon divergence is that of Agarwal et al. 2024, "On-Policy
Distillation of Language Models", arXiv 2306.13649, section 2, where the first argument is the teacher.
Divided by beta it goes to the forward divergence for beta to 0, divided by 1 - beta to the reverse one for
beta to 1; it is zero at both ends, which therefore stand for these two divergences themselves.

The gradients are written down instead of being left to autograd, which would keep several tensors of the size
of the logits, the largest tensors of a small model's training. Each is orthogonal to adding a constant to all
logits, so that it is also the gradient in the logits where outcomes are tokens. Where a teacher is known by
its most likely tokens and a tail (`Buckets`), the student's tokens are put together in the same way, and the
divergence is that of the two distributions over k + 1 outcomes: never negative, zero only where they agree,
and never more than over the whole vocabulary. The gradient of the tail is shared among its tokens by the
student's own probabilities: their sum is learned, their proportions stay the student's.

Where tokens of the tail were drawn as well, the forward divergence is that over the whole vocabulary after
all, on average: by the chain rule it is the one over the outcomes and ``p_tail KL(p | tail || q | tail)``,
which is a mean over the tail, and the mean over the drawn tokens is without bias, in value and gradient.
This is the sampling of Anshumann et al. 2025, "Sparse Logit Sampling", arXiv 2503.16870, of the tail alone.
The other divergences are no such means, and are those over the outcomes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import log
from typing import Final

import torch

from compress.numerics.buckets import Buckets
from compress.numerics.criterion import Criterion, Term

_CACHED: Final = 2**19
"""Numbers of a distribution that a core's caches hold together with what is computed from them."""
_Slope = Callable[[], torch.Tensor]
_Divergence = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, _Slope]]


@dataclass(frozen=True)
class Imitation:
    """How well a student imitates, position by position.

    Attributes:
        terms: ``[positions]`` each, in nats, unweighted: those with a weight, the forward divergence and the
            cross-entropy.
        loss: ``[positions]``, their weighted sum.
        gradient: ``[positions, vocabulary]``, of the sum of ``loss`` in the student's logits; ``None`` where
            it was not asked for.
    """

    terms: Mapping[Term, torch.Tensor]
    loss: torch.Tensor
    gradient: torch.Tensor | None


def imitation(
    student: torch.Tensor,
    teacher: torch.Tensor | Buckets,
    targets: torch.Tensor,
    criterion: Criterion,
    *,
    with_gradient: bool = False,
    scale: float = 1.0,
    consumed: bool = False,
) -> Imitation:
    """Compare distributions; everything is computed in float32, or in float64 where logits are float64.

    A CPU takes a few positions at a time, whose distributions stay in its caches from one operation to the
    next: through memory goes every logit once, and its gradient once.

    Args:
        student: logits ``[positions, vocabulary]``. No gradient flows through this function.
        teacher: logits of the same shape, or the most likely tokens and the tail, of the plain distribution.
        targets: integers ``[positions]``, the tokens that follow.
        scale: what the gradient is multiplied with.
        consumed: whether the gradient may take the place of the teacher's logits, where those of both are of
            one precision; otherwise it has that of the computation.

    Raises:
        ValueError: a temperature other than 1 with a tail, of which only the sum is known.
    """
    if isinstance(teacher, Buckets) and criterion.temperature != 1.0:
        raise ValueError("a distribution known by its most likely tokens and a tail cannot be softened")
    count, rows = len(student), _rows_at_once(student)
    wanted = scale if with_gradient else None
    if count <= rows:
        return _imitation(student, teacher, targets, criterion, wanted)
    gradient: torch.Tensor | None = None
    if with_gradient and consumed and isinstance(teacher, torch.Tensor) and teacher.dtype == student.dtype:
        gradient = teacher
    elif with_gradient:
        gradient = torch.empty_like(student, dtype=_precision(student))
    parts = []
    for at in (slice(start, start + rows) for start in range(0, count, rows)):
        theirs = teacher.rows(at) if isinstance(teacher, Buckets) else teacher[at]
        part = _imitation(student[at], theirs, targets[at], criterion, wanted)
        if gradient is not None and part.gradient is not None:
            gradient[at] = part.gradient
        parts.append(replace(part, gradient=None))
    terms = {name: torch.cat([part.terms[name] for part in parts]) for name in parts[0].terms}
    return Imitation(terms, torch.cat([part.loss for part in parts]), gradient)


def _rows_at_once(logits: torch.Tensor) -> int:
    """Positions that are compared at once: all on an accelerator; at least one for each thread of a CPU."""
    if logits.device.type != "cpu":
        return max(1, len(logits))
    return max(torch.get_num_threads(), _CACHED // logits.shape[-1])


@torch.no_grad()
def _imitation(
    student: torch.Tensor,
    teacher: torch.Tensor | Buckets,
    targets: torch.Tensor,
    criterion: Criterion,
    scale: float | None,
) -> Imitation:
    """See `imitation`; the gradient only where there is a scale of it."""
    temperature = criterion.temperature
    plain = _wide(student).log_softmax(-1)
    soft = plain if temperature == 1.0 else (_wide(student) / temperature).log_softmax(-1)
    if isinstance(teacher, Buckets):
        p, q = teacher.outcomes.to(soft.dtype), teacher.of(soft)
    else:
        theirs = _wide(teacher)
        p, q = (theirs if temperature == 1.0 else theirs / temperature).log_softmax(-1), soft
    terms: dict[Term, torch.Tensor] = {
        "forward_kl": torch.empty(0),
        "cross_entropy": -plain.gather(-1, targets[:, None])[:, 0],
    }
    slope: torch.Tensor | None = None
    for name, divergence in _divergences(criterion.beta).items():
        weight = criterion.weights.get(name, 0.0)
        if name not in criterion.weights and name not in terms:
            continue
        order = 1 if name == "total_variation" else 2
        value, gradient = divergence(p, q)
        if name == "forward_kl" and isinstance(teacher, Buckets):
            value = value + _inside_tail(teacher, p, q, soft)
        terms[name] = value * temperature**order
        if scale is not None and weight:
            part = gradient().mul_(scale * weight * temperature ** (order - 1))
            slope = part if slope is None else slope.add_(part)
    loss = sum((weight * terms[name] for name, weight in criterion.weights.items()), torch.zeros(()))
    found = None
    if scale is not None:
        share = scale * criterion.weights.get("cross_entropy", 0.0)
        found = _in_logits(slope, teacher, soft, p, q, scale * criterion.weights.get("forward_kl", 0.0))
        if share:
            truth = plain.exp_().mul_(share)
            truth.scatter_add_(-1, targets[:, None], torch.full_like(truth[:, :1], -share))
            found = truth if found is None else found.add_(truth)
        elif found is None:
            found = torch.zeros_like(plain)
    return Imitation(terms, loss, found)


def _inside_tail(
    teacher: Buckets, p: torch.Tensor, q: torch.Tensor, soft: torch.Tensor
) -> torch.Tensor | float:
    """An estimate of ``p_tail KL(p | tail || q | tail)`` from the drawn tokens, ``[positions]``."""
    if teacher.drawn is None or teacher.drawn_log_probabilities is None:
        return 0.0
    wanted = teacher.drawn_log_probabilities - p[:, -1:]
    said = soft.gather(-1, teacher.drawn.long()) - q[:, -1:]
    rest = p[:, -1].exp()
    return torch.where(rest > 0, rest * (wanted - said).mean(-1), 0.0)


def _in_logits(
    slope: torch.Tensor | None,
    teacher: torch.Tensor | Buckets,
    soft: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    forward: float,
) -> torch.Tensor | None:
    """The gradient in the logits from that over outcomes.

    For a token of the tail ``j``, ``d(log q_tail)/d(logit_j) = q_j / q_tail - q_j``, and gradients over
    outcomes sum to zero: what is left is the tail's own gradient times ``q_j / q_tail``. Inside the tail the
    forward divergence adds ``p_tail q_j / q_tail`` less the tail's share of each drawn token.

    Args:
        forward: weight of the forward divergence.
    """
    if slope is None or not isinstance(teacher, Buckets):
        return slope
    rest, tail = q[:, -1:], slope[:, -1:]
    drawn = teacher.drawn if forward else None
    inside = forward * p[:, -1:].exp()
    if drawn is not None:
        tail = tail + inside
    # Where no token is left, every one is overwritten below.
    found = (soft - torch.where(rest.isneginf(), 0.0, rest)).exp_().mul_(tail)
    found.scatter_(-1, teacher.tokens.long(), slope[:, :-1])
    if drawn is not None:
        found.scatter_add_(-1, drawn.long(), (-inside / drawn.shape[-1]).expand(drawn.shape))
    return found


def _divergences(beta: float) -> dict[Term, _Divergence]:
    """Each takes log-probabilities ``[positions, outcomes]`` of teacher and student.

    It gives its values ``[positions]`` and, on demand, the gradient in the student's logarithms, which sums
    to zero in each position.
    """
    return {
        "forward_kl": _forward_kl,
        "reverse_kl": _reverse_kl,
        "jensen_shannon": partial(_jensen_shannon, beta=beta),
        "total_variation": _total_variation,
    }


def _forward_kl(p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, _Slope]:
    wanted = p.exp()
    return _expected(wanted, p - q), lambda: q.exp().sub_(wanted)


def _reverse_kl(p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, _Slope]:
    said = q.exp()
    distance = torch.where(said > 0, q - p, 0.0)
    value = (said * distance).sum(-1)
    return value.clamp_min(0.0), lambda: (distance - value[:, None]).mul_(said)


def _jensen_shannon(p: torch.Tensor, q: torch.Tensor, beta: float) -> tuple[torch.Tensor, _Slope]:
    if beta in (0.0, 1.0):
        return (_reverse_kl if beta else _forward_kl)(p, q)
    mixture = torch.logaddexp(p + log(beta), q + log(1.0 - beta))
    said = q.exp()
    distance = torch.where(said > 0, q - mixture, 0.0)
    own = (said * distance).sum(-1)
    value = beta * _expected(p.exp(), p - mixture) + (1.0 - beta) * own.clamp_min(0.0)
    return value, lambda: (distance - own[:, None]).mul_(said).mul_(1.0 - beta)


def _total_variation(p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, _Slope]:
    said = q.exp()
    difference = said - p.exp()
    value = difference.abs().sum(-1) / 2
    sign = difference.sign_()
    return value, lambda: (sign - (said * sign).sum(-1, keepdim=True)).mul_(said).div_(2)


def _expected(probability: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The mean of a logarithm of a ratio; what cannot happen counts nothing, whatever its value."""
    # To look is cheap on a CPU, and to mask is not; an accelerator would have to be waited for.
    found = (probability * value).sum(-1) if value.device.type == "cpu" else None
    if found is None or found.isnan().any():
        found = torch.where(probability > 0, probability * value, 0.0).sum(-1)
    # What is left below zero is rounding.
    return found.clamp_min(0.0)


def _precision(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(_precision(logits))
