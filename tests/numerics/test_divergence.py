"""Divergences from a teacher and their gradients against autograd in double precision."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from compress.numerics import divergence
from compress.numerics.buckets import buckets
from compress.numerics.criterion import Criterion, Term
from compress.numerics.divergence import imitation

WEIGHTS: list[Mapping[Term, float]] = [
    {"forward_kl": 1.0},
    {"reverse_kl": 1.0},
    {"jensen_shannon": 1.0},
    {"total_variation": 1.0},
    {"cross_entropy": 1.0},
    {"forward_kl": 0.7, "cross_entropy": 0.3},
    {"total_variation": 0.5, "reverse_kl": 2.0, "jensen_shannon": 0.25, "forward_kl": 0.1},
]
Drawn = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def drawn(positions: int = 5, vocabulary: int = 11, scale: float = 3.0) -> Drawn:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(positions, vocabulary, generator=generator, dtype=torch.float64) * scale for _ in range(2)
    )
    return student, teacher, torch.randint(vocabulary, (positions,), generator=generator)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of log-probabilities, by torch's own function."""
    return kl_div(q, p, reduction="none", log_target=True).sum(-1)


def jensen_shannon(p: torch.Tensor, q: torch.Tensor, beta: float) -> torch.Tensor:
    """Agarwal et al. 2024, section 2, as it is printed."""
    mixture = (beta * p.exp() + (1 - beta) * q.exp()).log()
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


def reference(
    student: torch.Tensor,
    teacher: torch.Tensor,
    targets: torch.Tensor,
    criterion: Criterion,
    together: Callable[[torch.Tensor], torch.Tensor] = lambda probabilities: probabilities,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """The terms as they are defined, and the gradient of the weighted sum by autograd.

    Args:
        together: of probabilities ``[positions, vocabulary]``, those of fewer outcomes.
    """
    heat = criterion.temperature
    leaf = student.clone().requires_grad_()
    p = together((teacher / heat).softmax(-1)).log()
    q = together((leaf / heat).softmax(-1)).log()
    terms = {
        "forward_kl": heat**2 * kl(p, q),
        "reverse_kl": heat**2 * kl(q, p),
        "jensen_shannon": heat**2 * jensen_shannon(p, q, criterion.beta),
        "total_variation": heat * (p.exp() - q.exp()).abs().sum(-1) / 2,
        "cross_entropy": cross_entropy(leaf, targets, reduction="none"),
    }
    loss = sum((weight * terms[name] for name, weight in criterion.weights.items()), torch.zeros(()))
    loss.sum().backward()
    assert leaf.grad is not None
    return {name: value.detach() for name, value in terms.items()}, loss.detach(), leaf.grad


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_values_and_gradient_are_those_of_autograd(
    temperature: float, weights: Mapping[Term, float], beta: float
) -> None:
    student, teacher, targets = drawn()
    criterion = Criterion(weights, beta, temperature)
    found = imitation(student, teacher, targets, criterion, with_gradient=True)
    terms, loss, gradient = reference(student, teacher, targets, criterion)
    assert set(found.terms) == {"forward_kl", "cross_entropy", *weights}
    for name, value in found.terms.items():
        torch.testing.assert_close(value, terms[name], rtol=1e-12, atol=1e-12, msg=name)
    torch.testing.assert_close(found.loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("k", [1, 4, 10])
def test_over_buckets_they_are_those_of_the_tokens_put_together(weights: Any, k: int) -> None:
    student, teacher, targets = drawn()
    known = buckets(teacher, k)
    kept = torch.zeros_like(teacher).scatter_(1, known.tokens, 1.0).bool()

    def together(probabilities: torch.Tensor) -> torch.Tensor:
        rest = probabilities.masked_fill(kept, 0.0).sum(-1, keepdim=True)
        return torch.cat([probabilities.gather(-1, known.tokens), rest], dim=-1)

    criterion = Criterion(weights, beta=0.3)
    found = imitation(student, known, targets, criterion, with_gradient=True)
    _, loss, gradient = reference(student, teacher, targets, criterion, together)
    # What is known of the teacher is known in single precision.
    torch.testing.assert_close(found.loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-4, atol=1e-6)


def test_buckets_for_all_tokens_give_the_divergence_itself() -> None:
    student, teacher, targets = drawn()
    weights: Mapping[Term, float] = {"forward_kl": 0.5, "jensen_shannon": 0.5, "total_variation": 0.5}
    whole = imitation(student, teacher, targets, Criterion(weights), with_gradient=True)
    found = imitation(student, buckets(teacher, 11), targets, Criterion(weights), with_gradient=True)
    torch.testing.assert_close(found.loss, whole.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.gradient, whole.gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 4, 9])
def test_drawn_tokens_give_the_forward_divergence_itself_on_average(k: int) -> None:
    """Averaged over all tokens that can be drawn, weighted by their chances: without any noise."""
    student, teacher, targets = drawn()
    weights: Mapping[Term, float] = {"forward_kl": 0.7, "cross_entropy": 0.3}
    whole = imitation(student, teacher, targets, Criterion(weights), with_gradient=True)
    known = buckets(teacher, k)
    distribution = teacher.log_softmax(-1)
    loss, gradient = torch.zeros_like(whole.loss), torch.zeros_like(student)
    for token in range(11):
        column = torch.full((len(teacher), 1), token)
        each = replace(known, drawn=column, drawn_log_probabilities=distribution[:, token, None])
        chance = (distribution[:, token] - known.tail.double()).exp()
        chance[(known.tokens == token).any(-1)] = 0.0
        found = imitation(student, each, targets, Criterion(weights), with_gradient=True)
        assert found.gradient is not None
        loss += chance * found.loss
        gradient += chance[:, None] * found.gradient
    torch.testing.assert_close(loss, whole.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, whole.gradient, rtol=1e-4, atol=1e-6)


def test_drawn_tokens_change_no_other_divergence() -> None:
    student, teacher, targets = drawn()
    criterion = Criterion({"reverse_kl": 0.5, "jensen_shannon": 0.3, "total_variation": 0.2})
    plain = imitation(student, buckets(teacher, 4), targets, criterion, with_gradient=True)
    found = imitation(student, buckets(teacher, 4, 3), targets, criterion, with_gradient=True)
    assert torch.equal(found.loss, plain.loss)
    assert found.gradient is not None
    assert plain.gradient is not None
    assert torch.equal(found.gradient, plain.gradient)


def test_where_there_is_no_tail_draws_count_nothing() -> None:
    student, teacher, targets = drawn()
    teacher[:, 4:] = -torch.inf
    found = imitation(student, buckets(teacher, 4, 3), targets, Criterion(), with_gradient=True)
    expected = imitation(student, teacher, targets, Criterion(), with_gradient=True)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"])
def test_putting_tokens_together_never_makes_a_divergence_larger(name: Term) -> None:
    student, teacher, targets = drawn(positions=200, vocabulary=40)
    criterion = Criterion({name: 1.0}, beta=0.2)
    whole = imitation(student, teacher, targets, criterion).loss
    last = torch.zeros_like(whole)
    for k in (1, 4, 16, 39):
        found = imitation(student, buckets(teacher, k), targets, criterion).loss
        assert bool((found >= last - 1e-5).all())
        assert bool((found <= whole + 1e-5).all())
        last = found
    same = imitation(teacher, buckets(teacher, 4), targets, criterion, with_gradient=True)
    assert float(same.loss.max()) < 1e-6
    assert same.gradient is not None
    # The total variation has a corner where the distributions agree.
    assert name == "total_variation" or float(same.gradient.abs().max()) < 1e-6


def test_jensen_shannon_goes_to_the_divergences_it_lies_between() -> None:
    """As the paper scales them: D / beta to KL(teacher || student), D / (1 - beta) to the reverse."""
    student, teacher, targets = drawn(scale=1.0)
    forward, reverse = (
        imitation(student, teacher, targets, Criterion({name: 1.0}), with_gradient=True)
        for name in ("forward_kl", "reverse_kl")
    )
    for beta, share, limit in ((1e-7, 1e-7, forward), (1 - 1e-7, 1e-7, reverse)):
        found = imitation(
            student, teacher, targets, Criterion({"jensen_shannon": 1.0}, beta), with_gradient=True
        )
        assert found.gradient is not None
        torch.testing.assert_close(found.loss / share, limit.loss, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.gradient / share, limit.gradient, rtol=1e-3, atol=1e-6)
    for beta, limit in ((0.0, forward), (1.0, reverse)):
        found = imitation(
            student, teacher, targets, Criterion({"jensen_shannon": 1.0}, beta), with_gradient=True
        )
        assert torch.equal(found.loss, limit.loss)
        assert found.gradient is not None
        assert limit.gradient is not None
        assert torch.equal(found.gradient, limit.gradient)


def test_jensen_shannon_in_the_middle_is_symmetric_and_at_most_log_two() -> None:
    student, teacher, targets = drawn(scale=30.0)
    criterion = Criterion({"jensen_shannon": 1.0})
    there = imitation(student, teacher, targets, criterion).loss
    back = imitation(teacher, student, targets, criterion).loss
    torch.testing.assert_close(there, back)
    assert float(there.max()) <= math.log(2) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_narrow_logits_are_compared_in_float32(dtype: torch.dtype, weights: Mapping[Term, float]) -> None:
    student, teacher, targets = drawn()
    student, teacher = student.to(dtype), teacher.to(dtype)
    criterion = Criterion(weights, temperature=2.0)
    found = imitation(student, teacher, targets, criterion, with_gradient=True)
    _, loss, gradient = reference(student.double(), teacher.double(), targets, criterion)
    assert found.gradient is not None
    for came, wanted in ((found.loss, loss), (found.gradient, gradient)):
        assert came.dtype == torch.float32
        torch.testing.assert_close(came.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [w for w in WEIGHTS if "cross_entropy" not in w], ids=str)
def test_a_model_is_at_no_distance_from_itself(weights: Mapping[Term, float]) -> None:
    student, _, targets = drawn()
    criterion = Criterion(weights, temperature=3.0)
    found = imitation(student.float(), student.float(), targets, criterion, with_gradient=True)
    assert float(found.loss.max()) < 1e-6
    assert found.gradient is not None
    assert float(found.gradient.abs().max()) < 1e-6
    if list(weights) == ["forward_kl"]:
        assert found.loss.eq(0).all()
        assert found.gradient.eq(0).all()


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_tokens_that_both_rule_out_count_nothing(weights: Mapping[Term, float]) -> None:
    student, teacher, targets = drawn()
    teacher[:, 3] = student[:, 3] = -torch.inf
    targets[targets == 3] = 0
    criterion = Criterion(weights)
    found = imitation(student, teacher, targets, criterion, with_gradient=True)
    kept = [column for column in range(11) if column != 3]
    renumbered = targets - (targets > 3).long()
    _, loss, gradient = reference(student[:, kept], teacher[:, kept], renumbered, criterion)
    torch.testing.assert_close(found.loss, loss)
    assert found.gradient is not None
    torch.testing.assert_close(found.gradient[:, kept], gradient)


def test_what_is_ruled_out_by_one_alone_is_as_far_as_it_is() -> None:
    student, teacher, targets = drawn()
    teacher[:, 3] = -torch.inf
    weights: Mapping[Term, float] = {"jensen_shannon": 0.5, "total_variation": 0.5}
    found = imitation(student, teacher, targets, Criterion(weights), with_gradient=True)
    assert found.loss.isfinite().all()
    assert found.gradient is not None
    assert found.gradient.isfinite().all()
    assert imitation(student, teacher, targets, Criterion({"reverse_kl": 1.0})).loss.isposinf().all()


def test_a_tail_cannot_be_softened() -> None:
    student, teacher, targets = drawn()
    with pytest.raises(ValueError, match="cannot be softened"):
        imitation(student, buckets(teacher, 3), targets, Criterion(temperature=2.0))


def test_without_a_gradient_none_is_made() -> None:
    assert imitation(*drawn(), Criterion()).gradient is None


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("known", [False, True])
def test_positions_are_compared_a_few_at_a_time(
    weights: Mapping[Term, float], known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, targets = drawn(positions=7)
    wanted = buckets(teacher, 4, 3) if known else teacher
    whole = imitation(student, wanted, targets, Criterion(weights), with_gradient=True, scale=0.5)
    monkeypatch.setattr(divergence, "_CACHED", 2 * student.shape[1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    found = imitation(student, wanted, targets, Criterion(weights), with_gradient=True, scale=0.5)
    assert found.terms.keys() == whole.terms.keys()
    for name, value in whole.terms.items():
        torch.testing.assert_close(found.terms[name], value)
    torch.testing.assert_close(found.loss, whole.loss)
    torch.testing.assert_close(found.gradient, whole.gradient)
    assert imitation(student, wanted, targets, Criterion(weights)).gradient is None


def test_the_gradient_is_scaled() -> None:
    weights: Mapping[Term, float] = {"total_variation": 0.5, "forward_kl": 0.2, "cross_entropy": 0.3}
    plain, scaled = (
        imitation(*drawn(), Criterion(weights, temperature=2.0), with_gradient=True, scale=scale)
        for scale in (1.0, 0.25)
    )
    assert plain.gradient is not None
    torch.testing.assert_close(scaled.gradient, plain.gradient / 4)
    torch.testing.assert_close(scaled.loss, plain.loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gradient_may_take_the_place_of_a_teacher_of_the_same_precision(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, targets = drawn(positions=7)
    whole = imitation(student, teacher.to(dtype), targets, Criterion(), with_gradient=True)
    monkeypatch.setattr(divergence, "_CACHED", 0)
    given = teacher.to(dtype)
    found = imitation(student, given, targets, Criterion(), with_gradient=True, consumed=True)
    assert (found.gradient is given) == (dtype == student.dtype)
    torch.testing.assert_close(found.gradient, whole.gradient)
