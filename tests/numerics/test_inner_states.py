"""Losses of hidden states and attention against the papers' equations, written out with loops in float64."""

import math

import pytest
import torch

from compress.numerics.inner_states import apart, relation_divergence, score_distance, scores, visible

BATCH, LENGTH = 3, 5
LENGTHS = (5, 3, 1)


@pytest.fixture
def counted() -> torch.Tensor:
    return torch.arange(LENGTH)[None, :] < torch.tensor(LENGTHS)[:, None]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same_with_gradient(found: torch.Tensor, expected: torch.Tensor, leaf: torch.Tensor) -> None:
    """Values, and the gradient of a weighted sum of them."""
    torch.testing.assert_close(found, expected)
    weights = torch.arange(1.0, 1.0 + len(found), dtype=torch.float64)
    (ours,) = torch.autograd.grad((weights * found).sum(), leaf, retain_graph=True)
    (theirs,) = torch.autograd.grad((weights * expected).sum(), leaf)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("distance", ["mse", "relative", "cosine"])
def test_hidden_states_are_compared_position_by_position(distance: str, counted: torch.Tensor) -> None:
    ours, theirs = random(BATCH, LENGTH, 4, seed=1).requires_grad_(), random(BATCH, LENGTH, 4, seed=2)
    rows = []
    for one, other, length in zip(ours, theirs, LENGTHS, strict=True):
        terms, scale = [], []
        for position in range(length):
            a, b = one[position], other[position]
            if distance == "cosine":
                terms.append(1 - (a @ b) / (a.norm() * b.norm()))
            else:
                terms.append(((a - b) ** 2).sum() / 4)
            scale.append((b**2).sum() / 4)
        mean = torch.stack(terms).mean()
        rows.append(mean / torch.stack(scale).mean() if distance == "relative" else mean)
    same_with_gradient(apart(ours, theirs, counted, distance), torch.stack(rows), ours)  # type: ignore[arg-type]


def test_what_is_padding_has_no_say_and_no_gradient(counted: torch.Tensor) -> None:
    ours, theirs = random(BATCH, LENGTH, 4, seed=1), random(BATCH, LENGTH, 4, seed=2)
    poisoned = ours.masked_fill(~counted[..., None], 1e6).requires_grad_()
    seen = visible(counted.long(), causal=False)
    for found, expected in (
        (apart(poisoned, theirs, counted, "mse"), apart(ours, theirs, counted, "mse")),
        (
            relation_divergence(poisoned, theirs, 2, counted, seen),
            relation_divergence(ours, theirs, 2, counted, seen),
        ),
    ):
        torch.testing.assert_close(found, expected)
        (gradient,) = torch.autograd.grad(found.sum(), poisoned)
        assert torch.isfinite(gradient).all()
        assert (gradient[~counted] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_relations_are_those_of_minilm(heads: int, causal: bool, counted: torch.Tensor) -> None:
    # Widths of teacher and student differ, and so do the widths of their relation heads.
    ours, theirs = random(BATCH, LENGTH, 4, seed=3).requires_grad_(), random(BATCH, LENGTH, 6, seed=4)

    def relation(states: torch.Tensor, row: int, head: int, position: int) -> torch.Tensor:
        width = states.shape[-1] // heads
        part = states[row, :, head * width : (head + 1) * width]
        last = position + 1 if causal else LENGTHS[row]
        products = [part[position] @ part[other] / math.sqrt(width) for other in range(last)]
        return torch.softmax(torch.stack(products), 0)

    rows = []
    for row, length in enumerate(LENGTHS):
        terms = []
        for head in range(heads):
            for position in range(length):
                p, q = relation(theirs, row, head, position), relation(ours, row, head, position)
                terms.append((p * (p.log() - q.log())).sum())
        rows.append(torch.stack(terms).mean())
    found = relation_divergence(ours, theirs, heads, counted, visible(counted.long(), causal=causal))
    same_with_gradient(found, torch.stack(rows), ours)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_scores_are_compared_head_by_head(causal: bool, counted: torch.Tensor) -> None:
    queries, keys = random(BATCH, 4, LENGTH, 3, seed=5).requires_grad_(), random(BATCH, 2, LENGTH, 3, seed=6)
    theirs = random(BATCH, 4, LENGTH, LENGTH, seed=7)
    rows = []
    for row, length in enumerate(LENGTHS):
        terms = []
        for head in range(4):
            for one in range(length):
                for other in range(one + 1 if causal else length):
                    score = queries[row, head, one] @ keys[row, head // 2, other] * 0.5
                    terms.append((score - theirs[row, head, one, other]) ** 2)
        rows.append(torch.stack(terms).mean())
    found = score_distance(
        scores(queries, keys, 0.5), theirs, counted, visible(counted.long(), causal=causal)
    )
    same_with_gradient(found, torch.stack(rows), queries)


def test_a_model_is_not_apart_from_itself(counted: torch.Tensor) -> None:
    states = random(BATCH, LENGTH, 4, seed=8)
    seen = visible(counted.long(), causal=True)
    nothing = torch.zeros(BATCH, dtype=torch.float64)
    for distance in ("mse", "relative", "cosine"):
        torch.testing.assert_close(apart(states, states, counted, distance), nothing)  # type: ignore[arg-type]
    torch.testing.assert_close(relation_divergence(states, states, 2, counted, seen), nothing)


def test_half_precision_is_compared_in_float32(counted: torch.Tensor) -> None:
    states = random(BATCH, LENGTH, 4, seed=9).bfloat16()
    assert apart(states, states, counted, "mse").dtype is torch.float32
