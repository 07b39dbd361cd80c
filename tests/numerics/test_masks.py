"""Scores and masks against sums written out, and ties by index."""

import pytest
import torch

from compress.core.errors import CalibrationError
from compress.numerics.masks import (
    ColumnNorms,
    PartImportance,
    lowest_mask,
    pattern_mask,
    row_mask,
    strongest,
    whole,
)


def _rows(tokens: int = 40, columns: int = 12) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0))


def test_column_norms_are_those_of_all_rows_whatever_the_batches() -> None:
    rows = _rows()
    norms = ColumnNorms(12)
    for part in rows.split(7):
        norms.add(part)
    norms.add(rows[:0])
    assert norms.tokens == 40
    torch.testing.assert_close(norms.norms, rows.norm(dim=0))


def test_many_small_inputs_do_not_get_lost_beside_a_large_sum() -> None:
    norms = ColumnNorms(1)
    norms.add(torch.full((1, 1), 1e4))
    for _ in range(1000):
        norms.add(torch.full((1, 1), 1.0))
    assert float(norms._squares[0]) == 1e8 + 1000


def test_importance_of_channels_is_the_mean_magnitude_in_the_root_of_squares() -> None:
    sequences = _rows().view(4, 10, 12)
    importance = PartImportance(torch.arange(12).unsqueeze(1))
    for sequence in sequences:
        importance.add(sequence)
    expected = sequences.abs().mean(1).square().sum(0).sqrt()
    torch.testing.assert_close(importance.importance.float(), expected)


def test_importance_of_heads_is_of_the_norm_of_their_columns() -> None:
    sequences = _rows().view(4, 10, 12)
    columns = torch.tensor([[0, 5, 7], [1, 2, 3], [4, 6, 8], [9, 10, 11]])
    importance = PartImportance(columns)
    for sequence in sequences:
        importance.add(sequence)
    for part, chosen in enumerate(columns):
        norms = sequences[..., chosen].norm(dim=-1)
        expected = norms.mean(1).square().sum().sqrt()
        assert float(importance.importance[part]) == pytest.approx(float(expected))
    assert importance.tokens == 40


@pytest.mark.parametrize("make", [lambda: ColumnNorms(2), lambda: PartImportance(torch.tensor([[0], [1]]))])
def test_no_data_and_unusable_data_are_errors(make: object) -> None:
    read = {"ColumnNorms": "norms", "PartImportance": "importance"}
    statistic = make()  # type: ignore[operator]
    with pytest.raises(CalibrationError, match="no calibration token"):
        getattr(statistic, read[type(statistic).__name__])
    statistic.add(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        getattr(statistic, read[type(statistic).__name__])


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected rows \[tokens, 3\], got \[2, 4\]"):
        ColumnNorms(3).add(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="expected one sequence"):
        PartImportance(torch.tensor([[0]])).add(torch.zeros(1, 2, 4))


@pytest.mark.parametrize(("sparsity", "gone"), [(0.5, 5), (0.29, 2), (0.3, 3), (0.7, 7), (0.05, 0)])
def test_every_row_loses_the_same_number_of_its_lowest_scores(sparsity: float, gone: int) -> None:
    scores = _rows(6, 10).abs()
    mask = row_mask(scores, sparsity)
    assert (~mask).sum(1).tolist() == [gone] * 6
    for row, staying in zip(scores, mask, strict=True):
        if gone:
            assert row[~staying].max() <= row[staying].min()


def test_a_pattern_leaves_so_many_in_every_run() -> None:
    scores = _rows(5, 16).abs()
    mask = pattern_mask(scores, 1, 4)
    assert bool((mask.view(5, 4, 4).sum(-1) == 1).all())
    assert torch.equal(mask.view(5, 4, 4).int().argmax(-1), scores.view(5, 4, 4).argmax(-1))
    with pytest.raises(ValueError, match="16 columns cannot be divided into runs of 5"):
        pattern_mask(scores, 2, 5)


def test_ties_are_broken_by_the_index() -> None:
    same = torch.ones(2, 8)
    assert row_mask(same, 0.5).tolist() == [[False] * 4 + [True] * 4] * 2
    assert pattern_mask(same, 2, 4).tolist() == [[False, False, True, True] * 2] * 2
    assert strongest(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), 2).tolist() == [1, 2]
    assert strongest(torch.ones(5), 3).tolist() == [0, 1, 2]
    assert lowest_mask(torch.ones(2, 3), 4).tolist() == [[False] * 3, [False, True, True]]
    scores = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    assert lowest_mask(scores, 2).tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("gone", [0, 1, 29, 60])
def test_a_whole_matrix_loses_its_lowest_scores_wherever_they_are(gone: int) -> None:
    scores = _rows(5, 12).abs()
    mask = lowest_mask(scores, gone)
    assert int((~mask).sum()) == gone
    expected = torch.ones(60, dtype=torch.bool)
    expected[scores.flatten().sort().indices[:gone]] = False
    assert torch.equal(mask, expected.view(5, 12))


@pytest.mark.parametrize("count", [3, 100, 4096 * 14336, 10**9 + 7])
def test_shares_that_were_counted_give_their_counts_back(count: int) -> None:
    for part in (1, 2, count // 3, count // 2 + 1, count - 1):
        assert whole(count, part / count) == part
    assert whole(100, 0.29) == 29
    assert whole(10, 0.299) == 2
