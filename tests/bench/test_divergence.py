"""Divergences against double precision, and the bound that a tail bucket gives."""

import math

import pytest
import torch

from compress.bench.divergence import compare_buckets, compare_logits
from compress.numerics.buckets import buckets


def logits(seed: int, positions: int = 300, choices: int = 50, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(positions, choices, generator=torch.Generator().manual_seed(seed))


def exact(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("difference", [1.0, 1e-2, 1e-3])
def test_divergence(difference: float) -> None:
    """Also where it is a millionth of a nat, below the rounding of the logarithms themselves."""
    before = logits(0)
    after = before + difference * logits(1)
    found, agrees = compare_logits(before, after)
    torch.testing.assert_close(found.double(), exact(before, after), rtol=1e-2, atol=1e-10)
    assert float(found.double().mean()) == pytest.approx(float(exact(before, after).mean()), rel=1e-4)
    assert torch.equal(agrees, before.argmax(-1) == after.argmax(-1))


def test_impossible_tokens() -> None:
    """What BEFORE rules out adds nothing; what AFTER alone rules out is infinitely far."""
    before = torch.tensor([[0.0, 0.0, -math.inf], [0.0, 0.0, 0.0]])
    after = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -math.inf]])
    found, _ = compare_logits(before, after)
    assert found.tolist() == [pytest.approx(math.log(1.5)), math.inf]


def test_a_tail_bucket_gives_a_lower_bound_that_grows_with_k() -> None:
    before, after = logits(0), logits(1)
    full = exact(before, after)
    last = torch.zeros(len(full))
    for k in (1, 5, 20, 49):
        found, agrees = compare_buckets(buckets(before, k), after)
        assert bool((found <= full + 1e-5).all())
        assert bool((found >= last - 1e-5).all())
        assert float(found.mean()) < float(full.mean()) or k == 49
        assert torch.equal(agrees, before.argmax(-1) == after.argmax(-1))
        last = found


def test_the_whole_vocabulary_gives_the_divergence_itself() -> None:
    before, after = logits(0), logits(1)
    found, _ = compare_buckets(buckets(before, 50), after)
    torch.testing.assert_close(found.double(), exact(before, after), rtol=1e-5, atol=1e-6)


def test_a_tail_against_its_definition() -> None:
    before, after = logits(2, positions=4), logits(3, positions=4)
    kept = buckets(before, 3)
    p, q = before.double().softmax(-1), after.double().softmax(-1)
    expected = []
    for row in range(4):
        head = kept.tokens[row].tolist()
        pairs = [(float(p[row, t]), float(q[row, t])) for t in head]
        pairs.append((1 - sum(a for a, _ in pairs), 1 - sum(b for _, b in pairs)))
        expected.append(sum(a * math.log(a / b) for a, b in pairs))
    assert compare_buckets(kept, after)[0].tolist() == pytest.approx(expected, rel=1e-5)
