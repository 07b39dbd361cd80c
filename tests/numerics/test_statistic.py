"""What all statistics of columns share: shapes, batches, and sums that tell nothing."""

from typing import final

import pytest
import torch

from compress.core.errors import CalibrationError
from compress.numerics.statistic import ColumnStatistic, check_sums


@final
class Sums(ColumnStatistic):
    def __init__(self, columns: int) -> None:
        super().__init__(columns)
        self.sums = torch.zeros(columns)

    def _take(self, values: torch.Tensor) -> None:
        assert len(values)
        assert values.dtype == torch.float32
        self.sums += values.sum(0)


def test_rows_come_in_float32_and_are_counted_and_empty_batches_pass_by() -> None:
    statistic = Sums(3)
    rows = torch.arange(12.0).view(4, 3)
    for batch in (rows[:1].half(), rows[1:1], rows[1:].double()):
        statistic.add(batch)
    assert statistic.tokens == 4
    assert torch.equal(statistic.sums, rows.sum(0))


@pytest.mark.parametrize("shape", [(2, 4), (3,), (1, 2, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected rows \[tokens, 3\]"):
        Sums(3).add(torch.zeros(shape))


def test_sums_over_nothing_or_over_nonsense_are_refused() -> None:
    check_sums(1, torch.zeros(2))
    with pytest.raises(CalibrationError, match="no calibration token"):
        check_sums(0, torch.zeros(2))
    for wrong in ("nan", "inf"):
        with pytest.raises(CalibrationError, match="NaN or infinite"):
            check_sums(1, torch.tensor([0.0, float(wrong)]))
