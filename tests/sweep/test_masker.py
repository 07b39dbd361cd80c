"""What options of methods that set weights to zero mean together."""

from typing import Any

import pytest

from compress.core.errors import UsageError
from compress.core.passes import build
from compress.prune.magnitude import Magnitude
from compress.prune.sparsegpt import SparseGpt
from compress.prune.wanda import Wanda
from compress.sweep.masker import Masker
from compress.sweep.zeros import Pattern, Zeros

METHODS = ("prune.magnitude", "prune.sparsegpt", "prune.wanda")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pattern": "4:2"}, "N:M with 0 < N < M"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "either sparsity or pattern"),
        ({"pattern": "2:4", "ratios": "outliers"}, "same share in every layer"),
        ({"spread": 0.1}, "ratios that differ"),
        ({"spread": 0.6, "ratios": "outliers"}, "less than or equal to 0.5"),
        ({"outlier_factor": 3.0}, "ratios by outliers"),
        ({"outlier_factor": 3.0, "ratios": "sensitivity"}, "ratios by outliers"),
        ({"ratios": "owl"}, "'uniform', 'outliers' or 'sensitivity'"),
    ],
)
def test_options_that_do_not_fit_are_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build(name, options)


@pytest.mark.parametrize(
    ("method", "zeros"),
    [
        (Wanda(), Zeros(0.5, None, "row")),
        (Wanda(sparsity=0.3), Zeros(0.3, None, "row")),
        (Magnitude(sparsity=0.3), Zeros(0.3, None, "matrix")),
        (Magnitude(scope="row"), Zeros(0.5, None, "row")),
        (Magnitude(scope="model"), Zeros(0.5, None, "matrix")),
        (SparseGpt(pattern="1:4"), Zeros(0.75, Pattern(1, 4))),
    ],
    ids=str,
)
def test_how_much_goes_follows_from_the_options(method: Masker, zeros: Zeros) -> None:
    assert method.zeros == zeros


def test_zeros_are_said_in_words() -> None:
    assert str(Zeros(0.5)) == "0.5 of each row"
    assert str(Zeros(1 / 3, None, "matrix")) == "0.333333 of the matrix"
    assert str(Zeros(0.5, Pattern(2, 4))) == "2:4"


def test_text_is_read_where_the_shares_need_it() -> None:
    assert Wanda().reads_calibration
    assert SparseGpt().reads_calibration
    assert not Magnitude().reads_calibration
    assert not Magnitude(scope="model").reads_calibration
    assert Magnitude(ratios="outliers").reads_calibration
    assert Magnitude(ratios="sensitivity").reads_calibration


def test_shares_are_the_same_unless_they_were_asked_to_differ() -> None:
    assert Wanda().uniform
    assert Magnitude(scope="row").uniform
    assert Magnitude(pattern="2:4").uniform
    assert not Magnitude(scope="model").uniform
    assert not SparseGpt(ratios="sensitivity").uniform
