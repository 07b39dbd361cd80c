"""The divergence from a teacher against autograd in double precision."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from compress.numerics.divergence import imitation


def drawn(positions: int = 5, vocabulary: int = 11, scale: float = 3.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(positions, vocabulary, generator=generator, dtype=torch.float64) * scale for _ in range(2)
    )
    return student, teacher, torch.randint(vocabulary, (positions,), generator=generator)


def reference(
    student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, temperature: float, share: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss as torch's own functions compute it, and its gradient by autograd."""
    leaf = student.clone().requires_grad_()
    divergence = temperature**2 * kl_div(
        (leaf / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="none"
    ).sum(-1)
    entropy = cross_entropy(leaf, targets, reduction="none")
    ((1 - share) * divergence + share * entropy).sum().backward()
    assert leaf.grad is not None
    return divergence.detach(), entropy.detach(), leaf.grad


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_values_and_gradient_are_those_of_autograd(temperature: float, share: float) -> None:
    student, teacher, targets = drawn()
    found = imitation(student, teacher, targets, temperature=temperature, share=share, with_gradient=True)
    divergence, entropy, gradient = reference(student, teacher, targets, temperature, share)
    torch.testing.assert_close(found.divergence, divergence, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.cross_entropy, entropy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_logits_are_compared_in_float32(dtype: torch.dtype) -> None:
    student, teacher, targets = drawn()
    student, teacher = student.to(dtype), teacher.to(dtype)
    found = imitation(student, teacher, targets, temperature=2.0, share=0.5, with_gradient=True)
    expected = reference(student.double(), teacher.double(), targets, 2.0, 0.5)
    for came, wanted in zip((found.divergence, found.cross_entropy, found.gradient), expected, strict=True):
        assert came is not None
        assert came.dtype == torch.float32
        torch.testing.assert_close(came.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_model_is_at_no_distance_from_itself() -> None:
    student, _, targets = drawn()
    found = imitation(student.float(), student.float(), targets, temperature=3.0, with_gradient=True)
    assert found.divergence.eq(0).all()
    assert found.gradient is not None
    assert found.gradient.eq(0).all()


def test_tokens_that_the_teacher_rules_out_count_nothing() -> None:
    student, teacher, targets = drawn()
    teacher[:, 3] = student[:, 3] = -torch.inf
    targets[targets == 3] = 0
    found = imitation(student, teacher, targets, with_gradient=True)
    kept = [column for column in range(11) if column != 3]
    renumbered = targets - (targets > 3).long()
    divergence, entropy, gradient = reference(student[:, kept], teacher[:, kept], renumbered, 1.0, 0.0)
    torch.testing.assert_close(found.divergence, divergence)
    torch.testing.assert_close(found.cross_entropy, entropy)
    assert found.gradient is not None
    torch.testing.assert_close(found.gradient[:, kept], gradient)


def test_without_a_gradient_none_is_made() -> None:
    assert imitation(*drawn()).gradient is None
