"""Groups of columns and chunks of rows."""

import pytest
import torch

from compress.core.scheme import Scheme
from compress.numerics.grouping import group_width, grouped, row_chunks


def test_grouped_keeps_neighbouring_columns_together() -> None:
    matrix = torch.arange(12.0).view(2, 6)
    assert grouped(matrix, Scheme(4, 3)).tolist() == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]
    assert grouped(matrix, Scheme(4, None)).shape == (2, 1, 6)


def test_grouped_refuses_a_group_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="6 columns cannot be divided into groups of 4"):
        grouped(torch.zeros(2, 6), Scheme(4, 4))


def test_group_width_is_the_row_for_one_scale_a_row() -> None:
    assert group_width(96, Scheme(4, None)) == 96
    assert group_width(96, Scheme(4, 32)) == 32


@pytest.mark.parametrize("elements", [1, 5, 12, 100])
def test_row_chunks_cover_every_row_once_and_keep_the_bound(elements: int) -> None:
    matrix = torch.zeros(7, 3)
    slices = list(row_chunks(matrix, elements))
    assert [row for part in slices for row in range(part.start, part.stop)] == list(range(7))
    assert all((part.stop - part.start) * 3 <= max(elements, 3) for part in slices)
