"""Ridge regression from second moments against numpy's least squares on the rows themselves."""

import numpy
import pytest
import torch

from compress.core.errors import CalibrationError
from compress.numerics.least_squares import Moments, absorbed, ridge

TOKENS, COLUMNS, ROWS = 60, 7, 3
KEPT = [0, 2, 3, 6]
GONE = [1, 4, 5]


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inputs(tokens: int = TOKENS, seed: int = 0) -> torch.Tensor:
    """Inputs whose columns depend on one another, and that are not zero on average."""
    mixed = _draw(tokens, COLUMNS, seed=seed) @ _draw(COLUMNS, COLUMNS, seed=7) * 0.5
    return mixed + _draw(1, COLUMNS, seed=8)


def _solved(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(numpy.linalg.lstsq(left.numpy(), right.numpy(), rcond=None)[0])


def _with_one(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_the_solution_is_that_of_least_squares_with_rows_of_the_ridge(strength: float) -> None:
    left, right = _inputs(), _draw(TOKENS, 2, seed=1)
    gram = left.T @ left
    ridges = (strength * gram.diagonal().mean()).sqrt() * torch.eye(COLUMNS, dtype=torch.float64)
    expected = _solved(torch.cat([left, ridges]), torch.cat([right, torch.zeros(COLUMNS, 2).double()]))
    torch.testing.assert_close(ridge(gram, left.T @ right, strength), expected)


def test_no_ridge_holds_the_intercept_back() -> None:
    left, right = _with_one(_inputs()), _draw(TOKENS, 2, seed=1) + 5
    gram = left.T @ left
    size = (1e3 * gram.diagonal()[:COLUMNS].mean()).sqrt()
    ridges = torch.cat([size * torch.eye(COLUMNS).double(), torch.zeros(COLUMNS, 1).double()], dim=1)
    expected = _solved(torch.cat([left, ridges]), torch.cat([right, torch.zeros(COLUMNS, 2).double()]))
    found = ridge(gram, left.T @ right, 1e3, intercept=True)
    torch.testing.assert_close(found, expected)
    assert float((found[-1] - right.mean(0)).abs().max()) < 0.1


def test_a_column_that_was_always_zero_takes_nothing() -> None:
    left, right = _inputs(), _draw(TOKENS, 2, seed=1)
    left[:, 3] = 0
    found = ridge(left.T @ left, left.T @ right, 0.0)
    others = [0, 1, 2, 4, 5, 6]
    torch.testing.assert_close(found[others], _solved(left[:, others], right))
    assert float(found[3].abs().max()) == 0


def test_a_system_without_a_solution_is_an_error() -> None:
    gram = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(CalibrationError, match="cannot be solved with a ridge of 0"):
        ridge(gram, torch.ones(2, 1), 0.0)


@pytest.mark.parametrize("intercept", [False, True])
def test_what_stays_takes_over_from_what_goes_as_least_squares_say(intercept: bool) -> None:
    inputs, weight = _inputs(), _draw(ROWS, COLUMNS, seed=2)
    seen = _with_one(inputs) if intercept else inputs
    made = absorbed(weight, seen.T @ seen, torch.tensor(KEPT), intercept=intercept, strength=0.0)
    held = _with_one(inputs[:, KEPT]) if intercept else inputs[:, KEPT]
    outputs = inputs @ weight.T
    expected = _solved(held, outputs).T
    torch.testing.assert_close(weight[:, KEPT] + made.change, expected[:, : len(KEPT)])
    if intercept:
        assert made.shift is not None
        torch.testing.assert_close(made.shift, expected[:, -1])
    else:
        assert made.shift is None
    left = (outputs - held @ expected.T).square().sum() / outputs.square().sum()
    lost = (inputs[:, GONE] @ weight[:, GONE].T).square().sum() / outputs.square().sum()
    assert made.after == pytest.approx(float(left))
    assert made.before == pytest.approx(float(lost))
    assert made.after < made.before


def test_a_large_ridge_leaves_the_weights_as_they_are() -> None:
    inputs, weight = _inputs(), _draw(ROWS, COLUMNS, seed=2)
    made = absorbed(weight, inputs.T @ inputs, torch.tensor(KEPT), strength=1e9)
    assert float(made.change.abs().max()) < 1e-6
    assert made.after == pytest.approx(made.before, rel=1e-6)


def test_outputs_on_other_tokens_come_nearer() -> None:
    inputs, weight, other = _inputs(400), _draw(ROWS, COLUMNS, seed=2), _inputs(400, seed=5)
    made = absorbed(weight, inputs.T @ inputs, torch.tensor(KEPT))
    wanted = other @ weight.T
    without = (wanted - other[:, KEPT] @ weight[:, KEPT].T).norm()
    repaired = (wanted - other[:, KEPT] @ (weight[:, KEPT] + made.change).T).norm()
    assert repaired < 0.95 * without


def test_second_moments_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        absorbed(_draw(ROWS, COLUMNS), torch.eye(COLUMNS), torch.tensor(KEPT), intercept=True)


@pytest.mark.parametrize("intercept", [False, True])
def test_a_correction_is_weighted_by_the_length_of_the_target(intercept: bool) -> None:
    inputs, lost, targets = _inputs(), _draw(TOKENS, 4, seed=3), _draw(TOKENS, 4, seed=4)
    targets[::5] *= 100
    moments = Moments(COLUMNS, 4, intercept=intercept, dtype=torch.float64)
    for part in range(0, TOKENS, 17):
        rows = slice(part, part + 17)
        moments.add(inputs[rows], lost[rows], targets[rows])
    assert moments.tokens == TOKENS
    found = moments.correction(strength=0.0)
    share = 1 / targets.norm(dim=1, keepdim=True)
    left = (_with_one(inputs) if intercept else inputs) * share
    expected = _solved(left, lost * share)
    torch.testing.assert_close(found.change, expected[:COLUMNS].T)
    assert (found.shift is not None) == intercept
    if found.shift is not None:
        torch.testing.assert_close(found.shift, expected[-1])
    assert found.before == pytest.approx(float((lost * share).square().sum()) / TOKENS)
    after = (lost * share - left @ expected).square().sum()
    assert found.after == pytest.approx(float(after) / TOKENS)


def test_no_data_unusable_data_and_other_shapes_are_errors() -> None:
    moments = Moments(2, 1)
    with pytest.raises(CalibrationError, match="no calibration token"):
        moments.correction()
    with pytest.raises(ValueError, match="expected inputs, losses and targets"):
        moments.add(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 1))
    moments.add(torch.tensor([[1.0, float("nan")]]), torch.ones(1, 1), torch.ones(1, 1))
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        moments.correction()
