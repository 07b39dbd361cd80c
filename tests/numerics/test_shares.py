"""Shares of layers against the formulas written out."""

import pytest
import torch

from compress.numerics.shares import outlier_share, shares_around, shares_by_outliers


def test_outliers_are_counted_against_the_mean_of_the_whole_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [
        (torch.randn(*shape, generator=generator) * scale, torch.rand(shape[1], generator=generator))
        for shape, scale in (((6, 8), 1.0), ((20, 4), 5.0))
    ]
    scores = torch.cat([(weight.abs() * norms).flatten() for weight, norms in matrices])
    for factor in (1.5, 3.0, 5.0):
        expected = float((scores > factor * scores.mean()).double().mean())
        assert outlier_share(matrices, factor) == pytest.approx(expected, abs=1e-12)
    assert outlier_share([(torch.zeros(2, 2), torch.ones(2))], 5.0) == 0.0
    with pytest.raises(ValueError, match="without weights"):
        outlier_share([], 5.0)


def test_shares_are_those_of_the_authors() -> None:
    outliers = [0.031, 0.012, 0.025, 0.02]
    ratios = torch.tensor(outliers, dtype=torch.float64) * 100
    # The authors' code, line by line; its numbers are shares that stay.
    kept = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * 0.08 * 2)
    kept = kept - kept.mean() + (1 - 0.6)
    assert shares_by_outliers(outliers, [10] * 4, 0.6, 0.08) == pytest.approx((1 - kept).tolist())


def test_the_mean_over_weights_is_the_sparsity() -> None:
    outliers, weights = [0.5, 0.1, 0.3], [100, 300, 50]
    shares = shares_by_outliers(outliers, weights, 0.7, 0.05)
    mean = sum(share * count for share, count in zip(shares, weights, strict=True)) / sum(weights)
    assert mean == pytest.approx(0.7)
    assert max(shares) - min(shares) == pytest.approx(0.1)
    # The more outliers, the less goes.
    assert shares[1] > shares[2] > shares[0]


def test_no_layer_gets_further_than_half_way_to_all_or_nothing() -> None:
    for sparsity in (0.05, 0.5, 0.97):
        shares = shares_by_outliers([0.9, 0.1, 0.11, 0.12], [1] * 4, sparsity, 0.3)
        assert sum(shares) / 4 == pytest.approx(sparsity)
        assert min(shares) >= sparsity / 2 - 1e-12
        assert max(shares) <= (1 + sparsity) / 2 + 1e-12


def test_layers_that_are_alike_lose_alike() -> None:
    assert shares_by_outliers([0.2, 0.2], [3, 4], 0.5, 0.08) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("sparsity", "spread", "expected"),
    [
        (0.5, 0.08, (420, 460, 500, 540, 580)),
        (0.9, 0.08, (850, 875, 900, 925, 950)),
        (0.1, 0.5, (50, 75, 100, 125, 150)),
        (0.5, 0.001, (499, 500, 501)),
    ],
)
def test_shares_to_choose_among_lie_around_the_mean(
    sparsity: float, spread: float, expected: tuple[int, ...]
) -> None:
    assert shares_around(sparsity, spread, 2, 1000) == expected
