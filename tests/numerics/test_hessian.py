"""The Hessian against float64, its factor against its definition, and damping that recovers."""

import math

import pytest
import torch

from compress.core.errors import CalibrationError
from compress.numerics import hessian as module
from compress.numerics.hessian import Hessian, Order


def _inputs(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs with columns of different size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / math.sqrt(columns)
    rows = torch.randn(tokens, columns, generator=generator) @ (torch.eye(columns) + mixing)
    return rows * torch.linspace(0.1, 3, columns)[torch.randperm(columns, generator=generator)]


def _of(rows: torch.Tensor) -> Hessian:
    hessian = Hessian(rows.shape[1])
    hessian.add(rows)
    return hessian


@pytest.mark.parametrize("block", [4, 7, 512])
def test_strips_of_the_triangle_give_the_whole_product(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    rows = _inputs(300, 20)
    hessian = Hessian(20)
    for part in rows.split(37):
        hessian.add(part)
    exact = rows.double().T @ rows.double()
    assert hessian.tokens == 300
    assert torch.equal(hessian.matrix, hessian.matrix.T)
    assert torch.allclose(hessian.matrix.double(), exact, rtol=1e-5, atol=1e-5 * exact.diagonal().max())


def test_more_rows_may_follow_after_the_matrix_was_read() -> None:
    rows = _inputs(64, 12)
    hessian = _of(rows[:40])
    assert hessian.matrix.shape == (12, 12)
    first = hessian.factor(0.01, "static")
    hessian.add(rows[40:])
    assert torch.allclose(hessian.matrix, _of(rows).matrix, rtol=1e-5, atol=1e-4)
    assert hessian.factor(0.01, "static") is not first


def test_low_precision_rows_are_summed_in_float32() -> None:
    rows = _inputs(50, 8).bfloat16()
    assert torch.allclose(_of(rows).matrix, _of(rows.float()).matrix)
    assert _of(rows).matrix.dtype == torch.float32


def test_rows_of_another_shape_are_refused() -> None:
    for shape in ((3, 5), (2, 3, 4), (4,)):
        with pytest.raises(ValueError, match=r"expected rows \[tokens, 4\]"):
            Hessian(4).add(torch.zeros(shape))


@pytest.mark.parametrize("order", ["static", "none"])
def test_the_factor_is_the_unit_triangular_one_of_the_damped_matrix(order: Order) -> None:
    hessian = _of(_inputs(200, 16))
    factor = hessian.factor(0.05, order)
    damped = hessian.matrix.double() + 0.05 * hessian.mean_diagonal * torch.eye(16, dtype=torch.float64)
    arranged = damped[factor.order][:, factor.order]
    unit = factor.unit.double()
    assert torch.equal(unit, unit.tril())
    assert torch.equal(unit.diagonal(), torch.ones(16, dtype=torch.float64))
    pivots = torch.linalg.cholesky(arranged).diagonal().square()
    assert torch.allclose((unit * pivots) @ unit.T, arranged, rtol=1e-4, atol=1e-4 * arranged.max())
    assert torch.allclose(factor.pivots.double(), pivots, rtol=1e-4)
    for place in (0, 5, 15):
        inverse = torch.linalg.inv(arranged[: place + 1, : place + 1])
        assert float(factor.pivots[place] * inverse[place, place]) == pytest.approx(1, rel=1e-4)
    assert factor.damping == 0.05


def test_static_order_ends_with_the_largest_diagonal_and_ties_keep_their_order() -> None:
    hessian = Hessian(4)
    hessian.add(torch.diag(torch.tensor([1.0, 3.0, 2.0, 3.0])))
    assert hessian.factor(0.0, "static").order.flip(0).tolist() == [1, 3, 2, 0]
    assert hessian.factor(0.0, "none").order.flip(0).tolist() == [0, 1, 2, 3]


def test_one_factor_serves_all_layers_that_share_the_input() -> None:
    hessian = _of(_inputs(100, 8))
    first = hessian.factor(0.01, "static")
    assert hessian.factor(0.01, "static") is first
    assert hessian.factor(0.02, "static") is not first


def test_factoring_leaves_the_matrix_as_it_is() -> None:
    hessian = _of(_inputs(100, 8))
    before = hessian.matrix.clone()
    hessian.factor(0.01, "static")
    assert torch.equal(hessian.matrix, before)


def test_dead_columns_have_a_unit_diagonal_and_do_not_count_for_the_mean() -> None:
    rows = _inputs(100, 8)
    rows[:, 3] = 0
    hessian = _of(rows)
    assert hessian.dead.tolist() == [column == 3 for column in range(8)]
    assert hessian.diagonal[3] == 1
    live = (rows.double() ** 2).sum(0)
    assert hessian.mean_diagonal == pytest.approx(float(live.sum() / 7), rel=1e-5)
    assert bool(torch.isfinite(hessian.factor(0.0, "static").unit).all())


def test_damping_grows_until_the_factor_exists() -> None:
    # Fewer tokens than columns: singular without damping.
    hessian = _of(_inputs(3, 12))
    factor = hessian.factor(0.0, "static")
    assert 0 < factor.damping <= 1
    assert bool(torch.isfinite(factor.unit).all())
    assert hessian.factor(0.0, "static") is factor


def test_damping_that_never_suffices_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    hessian = _of(_inputs(100, 6))
    monkeypatch.setattr(Hessian, "_factorized", lambda self, places, damping: None)
    with pytest.raises(CalibrationError, match="even with damping 1") as caught:
        hessian.factor(0.01, "static")
    assert "more tokens" in caught.value.hint


def test_no_token_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="no calibration token reached this layer"):
        Hessian(4).factor(0.01, "static")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_an_error(bad: float) -> None:
    rows = _inputs(10, 4)
    rows[2, 1] = bad
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        _of(rows).factor(0.01, "static")
