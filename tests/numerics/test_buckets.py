"""Buckets and what packing costs; the bound that a tail gives is in tests/bench/test_divergence.py."""

import pytest
import torch

from compress.numerics.buckets import buckets, pack, packed_bytes, packed_layout, tail, unpack


def logits(positions: int, vocabulary: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("draws", [0, 12])
@pytest.mark.parametrize("vocabulary", [300, 2**16, 2**16 + 1, 151_936])
def test_packed_buckets_come_back(vocabulary: int, draws: int) -> None:
    found = buckets(logits(9, vocabulary), 64, draws)
    packed = pack(found, vocabulary)
    layout = packed_layout(64, draws, vocabulary)
    assert {name: (each.dtype, tuple(each.shape[1:])) for name, each in packed.items()} == layout
    size = sum(each.numel() * each.element_size() for each in packed.values())
    assert size == 9 * packed_bytes(64, draws, vocabulary)
    assert size == 9 * (2 + (64 + draws) * (4 if vocabulary <= 2**16 else 5))
    assert size <= 9 * 382
    back = unpack(packed)
    assert (back.drawn is None) == (draws == 0)
    if found.drawn is not None and back.drawn is not None and back.drawn_log_probabilities is not None:
        assert torch.equal(back.drawn.long(), found.drawn)
        torch.testing.assert_close(
            back.drawn_log_probabilities, found.drawn_log_probabilities, rtol=1e-3, atol=1e-3
        )
    assert torch.equal(back.tokens.long(), found.tokens)
    # 2^-11 of the logarithm, and a common factor.
    torch.testing.assert_close(back.log_probabilities, found.log_probabilities, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(back.tail, found.tail, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(back.outcomes.exp().sum(-1), torch.ones(9))
    torch.testing.assert_close(back.outcomes.exp(), found.outcomes.exp(), rtol=0.02, atol=3e-4)
    assert torch.equal(back.first.long(), found.first)


def test_a_tail_may_be_empty_or_all_there_is() -> None:
    certain = torch.tensor([[200.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    for k in (1, 4):
        back = unpack(pack(buckets(certain, k), 4))
        torch.testing.assert_close(back.outcomes.exp().sum(-1), torch.ones(2))
        assert not back.outcomes.isnan().any()
    assert back.tail.isneginf().all()


def test_a_tail_is_summed_and_not_what_is_left_of_one() -> None:
    distribution = torch.tensor([[30.0, 0.0, 0.0]]).log_softmax(-1)
    found = tail(distribution, torch.tensor([[0]]))
    assert float(found) == pytest.approx(-30 + torch.tensor(2.0).log().item(), rel=1e-6)


def test_rows_of_a_part() -> None:
    found = buckets(logits(6, 50), 5)
    part = found.rows(slice(2, 4))
    assert torch.equal(part.outcomes, found.outcomes[2:4])
    assert torch.equal(part.first, found.first[2:4])
    drawn = buckets(logits(6, 50), 5, 3).rows(slice(2, 4)).drawn
    assert drawn is not None
    assert drawn.shape == (2, 3)


def test_draws_follow_the_tail() -> None:
    each = logits(3, 40)
    generator = torch.Generator().manual_seed(1)
    found = buckets(each, 4, 100_000, generator)
    assert found.drawn is not None
    assert found.drawn_log_probabilities is not None
    distribution = each.log_softmax(-1)
    expected = distribution.exp().scatter(1, found.tokens, 0.0)
    expected /= expected.sum(-1, keepdim=True)
    for row in range(3):
        counted = torch.bincount(found.drawn[row], minlength=40) / 100_000
        # Five standard deviations of a frequency.
        assert bool(((counted - expected[row]).abs() < 5 * (expected[row] / 100_000).sqrt() + 1e-6).all())
        assert counted[found.tokens[row]].eq(0).all()
    torch.testing.assert_close(found.drawn_log_probabilities, distribution.gather(1, found.drawn))
    again = buckets(each, 4, 100_000, torch.Generator().manual_seed(1))
    assert again.drawn is not None
    assert torch.equal(again.drawn, found.drawn)


def test_draws_from_nothing_are_some_token() -> None:
    certain = torch.tensor([[300.0, -300.0, -torch.inf, -torch.inf]])
    found = buckets(certain, 1, 5)
    assert found.drawn is not None
    assert bool(((found.drawn >= 0) & (found.drawn < 4)).all())
