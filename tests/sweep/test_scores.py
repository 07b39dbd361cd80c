"""Which weights stay, by row, by matrix and by pattern."""

import pytest
import torch

from compress.core.errors import CalibrationError
from compress.numerics.hessian import Hessian
from compress.numerics.masks import ColumnNorms
from compress.sweep.scores import by_input, staying
from compress.sweep.zeros import Pattern, Zeros

SCORES = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 2.0, 3.0, 4.0]])


def test_what_is_compared_is_what_was_asked_for() -> None:
    assert (~staying(SCORES, Zeros(0.5))).nonzero().tolist() == [[0, 2], [0, 3], [1, 0], [1, 1]]
    assert (~staying(SCORES, Zeros(0.5, None, "matrix"))).nonzero().tolist() == [
        [1, 0],
        [1, 1],
        [1, 2],
        [1, 3],
    ]
    runs = staying(SCORES, Zeros(0.5, Pattern(1, 2), "matrix"))
    assert (~runs).nonzero().tolist() == [[0, 1], [0, 3], [1, 0], [1, 2]]


def test_a_score_is_the_magnitude_times_the_norm_of_the_input() -> None:
    norms = ColumnNorms(4)
    norms.add(torch.tensor([[3.0, 0.0, 1.0, 2.0], [4.0, 0.0, 0.0, 0.0]]))
    assert by_input(-SCORES, norms).tolist() == [[45.0, 0.0, 7.0, 12.0], [5.0, 0.0, 3.0, 8.0]]


@pytest.mark.parametrize("statistic", [None, Hessian(4)])
def test_without_its_input_a_weight_has_no_score(statistic: Hessian | None) -> None:
    with pytest.raises(CalibrationError, match="cannot be scored without their input"):
        by_input(SCORES, statistic)
