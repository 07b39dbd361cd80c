"""How readers of a norm are fitted, against the normal equations written out."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from compress.core.errors import CalibrationError
from compress.models.folds import Fold
from compress.numerics.least_squares import COLUMNS_RIDGE
from compress.sweep.slice_repair import _Sums
from compress.sweep.slice_weights import Before

WIDTH, KEPT, TOKENS = 12, 5, 400


def sums(carried: float) -> tuple[_Sums, Fold, torch.Tensor, torch.Tensor]:
    """Sums over a norm that adds something; how its readers see it, and what it adds."""
    generator = torch.Generator().manual_seed(0)
    seen, added = torch.randn(WIDTH, KEPT, generator=generator), torch.randn(WIDTH, generator=generator)
    norm = Fold("", "norm", "norm", torch.arange(WIDTH), (), {"weight": 0.0, "bias": 0.0})
    weights: Any = SimpleNamespace(
        into=torch.zeros(WIDTH, KEPT),
        seen=lambda _: seen,
        before=lambda _: Before(torch.ones(WIDTH), added),
    )
    narrow = nn.LayerNorm(KEPT)
    nn.init.constant_(narrow.bias, carried)
    small: Any = SimpleNamespace(model=nn.ModuleDict({"norm": narrow}))
    return _Sums(norm, weights, small), norm, seen, added


@pytest.mark.parametrize("carried", [0.0, 1.0])
def test_the_fit_is_that_of_the_normal_equations(carried: float) -> None:
    found, _, seen, added = sums(carried)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(TOKENS, KEPT, generator=generator)
    true = torch.randn(WIDTH, KEPT, generator=generator)
    wanted = rows @ true.T + 0.1 * torch.randn(TOKENS, WIDTH, generator=generator) + added
    for part in range(0, TOKENS, 100):
        came = (rows + carried)[part : part + 100].view(2, 50, KEPT)
        found.add([came], [wanted[part : part + 100].view(2, 50, WIDTH)])
    change, fitted = found.solved()
    gram = (rows.T @ rows).double()
    system = gram + COLUMNS_RIDGE * gram.diagonal().mean() * torch.eye(KEPT)
    lost = (wanted - added - rows @ seen.T).double()
    expected = torch.linalg.solve(system, rows.T.double() @ lost).T
    torch.testing.assert_close(change.double(), expected, rtol=1e-4, atol=1e-5)
    size = (wanted - added).double().norm()
    left = (lost - rows.double() @ expected.T).norm()
    assert fitted.before == pytest.approx(float(lost.norm() / size), rel=1e-4)
    assert fitted.after == pytest.approx(float(left / size), rel=1e-3)
    assert fitted.tokens == TOKENS


def test_what_is_not_finite_is_an_error() -> None:
    found, *_ = sums(0.0)
    with pytest.raises(CalibrationError, match="no calibration token"):
        found.solved()
    found.add([torch.full((1, 4, KEPT), torch.nan)], [torch.zeros(1, 4, WIDTH)])
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        found.solved()
