"""How far a student's next-token distributions are from a teacher's, and the gradient in its logits.

Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2:
both distributions are softened by a temperature, and the divergence between them is multiplied by its
square, so that the size of the gradient does not depend on it. The gradient is written down instead of
being left to autograd: it is a difference of two distributions, and what autograd would keep to arrive at
it is several times the size of the logits, which are the largest tensors of a small model's training.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Imitation:
    """How well a student imitates, position by position.

    Attributes:
        divergence: ``[positions]``, ``T^2 KL(teacher_T || student_T)`` in nats.
        cross_entropy: ``[positions]``, of the student against the token that follows, in nats.
        gradient: ``[positions, vocabulary]``, of the sum over positions of
            ``(1 - share) divergence + share cross_entropy`` in the student's logits; ``None`` where it was
            not asked for.
    """

    divergence: torch.Tensor
    cross_entropy: torch.Tensor
    gradient: torch.Tensor | None


def imitation(
    student: torch.Tensor,
    teacher: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    share: float = 0.0,
    with_gradient: bool = False,
) -> Imitation:
    """Compare logits; everything is computed in float32, or in float64 where the logits are float64.

    Args:
        student, teacher: logits ``[positions, vocabulary]``. No gradient flows through this function.
        targets: integers ``[positions]``, the tokens that follow.
        temperature: above 0; logits are divided by it for the divergence.
        share: of the cross-entropy in the gradient, in ``[0, 1]``.
    """
    with torch.no_grad():
        student, teacher = _wide(student), _wide(teacher)
        plain = student.log_softmax(-1)
        cross_entropy = -plain.gather(-1, targets[:, None])[:, 0]
        soft = plain if temperature == 1.0 else (student / temperature).log_softmax(-1)
        wanted = (teacher / temperature).log_softmax(-1)
        probability = wanted.exp()
        # A token that the teacher rules out counts nothing, whatever the student thinks of it.
        terms = torch.where(probability > 0, probability * (wanted - soft), 0.0)
        # What is left below zero is rounding.
        divergence = terms.sum(-1).clamp_min(0.0) * temperature**2
        gradient = None
        if with_gradient:
            # d(T^2 KL)/d(logits) = T^2 (q - p) / T
            gradient = soft.exp().sub_(probability).mul_(temperature * (1.0 - share))
            if share:
                truth = plain.exp().mul_(share)
                truth.scatter_add_(-1, targets[:, None], torch.full_like(truth[:, :1], -share))
                gradient += truth
    return Imitation(divergence, cross_entropy, gradient)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
