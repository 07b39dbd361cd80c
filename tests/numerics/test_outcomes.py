"""Outcomes of two vocabularies, against sums and sorts written out."""

import torch

from compress.numerics.outcomes import aligned, ordered


def test_aligned_outcomes_are_some_tokens_and_the_rest() -> None:
    logits = torch.randn(5, 9, dtype=torch.float32, requires_grad=True)
    tokens = torch.tensor([7, 0, 3])
    found = aligned(logits, tokens).exp()
    probabilities = logits.softmax(-1)
    torch.testing.assert_close(found[:, :3], probabilities[:, tokens])
    torch.testing.assert_close(found[:, 3], 1 - probabilities[:, tokens].sum(-1))
    wish = torch.randn(5, 4)
    (given,) = torch.autograd.grad(aligned(logits, tokens), logits, wish)
    written = torch.cat([probabilities[:, tokens], 1 - probabilities[:, tokens].sum(-1, keepdim=True)], -1)
    (expected,) = torch.autograd.grad(written.log(), logits, wish)
    torch.testing.assert_close(given, expected)


def test_where_all_tokens_are_known_the_rest_is_nothing() -> None:
    found = aligned(torch.randn(2, 3), torch.arange(3))
    torch.testing.assert_close(found.exp()[:, :3].sum(-1), torch.ones(2))
    assert bool((found[:, 3].exp() < 1e-20).all())


def test_twice_the_total_variation_of_ordered_ones_is_the_published_distance() -> None:
    """Equation 5 of Boizard et al.: the shorter vocabulary is padded with zeros."""
    ours, theirs = torch.randn(4, 6), torch.randn(4, 9)
    p, q = ours.softmax(-1), theirs.softmax(-1)
    padded = torch.cat([p.sort(-1, descending=True).values, torch.zeros(4, 3)], -1)
    published = (padded - q.sort(-1, descending=True).values).abs().sum(-1)
    found = (ordered(ours, 9).exp() - ordered(theirs, 9).exp()).abs().sum(-1)
    torch.testing.assert_close(found, published)
