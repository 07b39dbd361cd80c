"""SparseGPT against least squares, the paper's algorithm with an explicit inverse, and what it promises."""

import itertools
import math

import pytest
import torch

from compress.core.errors import CalibrationError
from compress.core.scheme import Scheme
from compress.numerics.feedback import Ranges, solve
from compress.numerics.hessian import Hessian
from compress.numerics.masks import ColumnNorms, pattern_mask, row_mask, whole
from compress.numerics.sparsification import Sparsified, refit, sparsify

ROWS, COLUMNS = 12, 32
Pattern = tuple[int, int] | None


def _inputs(seed: int = 0, tokens: int = 200, columns: int = COLUMNS) -> torch.Tensor:
    """Correlated inputs of uneven size."""
    generator = torch.Generator().manual_seed(100 + seed)
    mixing = torch.randn(columns, columns, generator=generator) / math.sqrt(columns)
    rows = torch.randn(tokens, columns, generator=generator) @ (torch.eye(columns) + 2 * mixing)
    return rows * torch.rand(columns, generator=generator).add(0.2)


def _weight(seed: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _of(inputs: torch.Tensor) -> Hessian:
    hessian = Hessian(inputs.shape[1])
    hessian.add(inputs)
    return hessian


def _damped(hessian: Hessian, damping: float) -> torch.Tensor:
    """What is factored, in float64: a unit diagonal where there were no inputs."""
    matrix = hessian.matrix.double().clone()
    matrix.diagonal().copy_(hessian.diagonal.double() + damping * hessian.mean_diagonal)
    return matrix


def _error(weight: torch.Tensor, other: torch.Tensor, inputs: torch.Tensor) -> float:
    """Squared error of the output relative to the squared output, from the inputs themselves."""
    outputs = inputs.double() @ weight.double().T
    return float((outputs - inputs.double() @ other.double().T).square().sum() / outputs.square().sum())


# -- one weight -----------------------------------------------------------------------------------------


def _made_up(inputs: torch.Tensor, weight: torch.Tensor, column: int) -> tuple[torch.Tensor, float]:
    """What the columns after one become when it goes, by dense least squares, and what is lost even so."""
    inputs, weight = inputs.double(), weight.double()
    wanted = inputs[:, column:] @ weight[column:]
    free = inputs[:, column + 1 :]
    if free.shape[1] == 0:
        return weight[:0], float(wanted.square().sum())
    solution = torch.linalg.lstsq(free, wanted.unsqueeze(1)).solution[:, 0]
    return solution, float((free @ solution - wanted).square().sum())


@pytest.mark.parametrize("column", [0, 5, 14, 15])
def test_a_pruned_weight_is_made_up_for_as_by_least_squares(column: int) -> None:
    inputs, weight = _inputs(columns=16), _weight(rows=1, columns=16)
    # By far the smallest, and still large enough to see what the others do about it.
    weight += 0.5 * torch.sign(weight)
    weight[0, column] = 0.01
    found = sparsify(weight.clone(), _of(inputs), sparsity=1 / 16, damping=0.0, block=16).weight[0]
    assert (found == 0).nonzero().flatten().tolist() == [column]
    assert torch.equal(found[:column], weight[0, :column])
    solution, _ = _made_up(inputs, weight[0], column)
    torch.testing.assert_close(found[column + 1 :].double(), solution, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_the_weight_that_goes_is_the_one_whose_loss_can_best_be_made_up_for(seed: int) -> None:
    inputs, weight = _inputs(seed, columns=16), _weight(seed, rows=1, columns=16)
    costs = [_made_up(inputs, weight[0], column)[1] for column in range(16)]
    found = sparsify(weight.clone(), _of(inputs), sparsity=1 / 16, damping=0.0, block=16).weight[0]
    assert (found == 0).nonzero().flatten().tolist() == [min(range(16), key=costs.__getitem__)]


def test_shares_of_blocks_are_counted_from_the_first_column_on() -> None:
    inputs, weight = _inputs(columns=16), _weight(rows=1, columns=16)
    # A sixteenth of 5, of 10 and of 15 weights is less than one, so one is due with the sixteenth alone.
    found = sparsify(weight.clone(), _of(inputs), sparsity=1 / 16, damping=0.0, block=5).weight[0]
    assert (found == 0).nonzero().flatten().tolist() == [15]


# -- whole matrices -------------------------------------------------------------------------------------


def _paper(
    weight: torch.Tensor, damped: torch.Tensor, sparsity: float, pattern: Pattern, block: int
) -> torch.Tensor:
    """Algorithm 1 of the paper in float64: an explicit inverse, and all columns updated at every step."""
    weight = weight.double().clone()
    rows, columns = weight.shape
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        pruned = torch.zeros(rows, stop - start, dtype=torch.bool)
        if pattern is None:
            scores = (weight[:, start:stop] / upper.diagonal()[start:stop]).square()
            count = whole(rows * stop, sparsity) - whole(rows * start, sparsity)
            pruned.view(-1)[scores.flatten().sort(stable=True).indices[:count]] = True
        for column in range(start, stop):
            if pattern is not None and column % pattern[1] == 0:
                kept, of = pattern
                scores = (weight[:, column : column + of] / upper.diagonal()[column : column + of]).square()
                lowest = scores.sort(dim=1, stable=True).indices[:, : of - kept]
                pruned[:, column - start : column - start + of].scatter_(1, lowest, True)
            value = weight[:, column].masked_fill(pruned[:, column - start], 0)
            error = (weight[:, column] - value) / upper[column, column]
            weight[:, column:] -= torch.outer(error, upper[column, column:])
            weight[:, column] = value
    return weight


@pytest.mark.parametrize(
    ("sparsity", "pattern", "block"),
    [
        (0.5, None, 8),
        (0.5, None, 32),
        (0.7, None, 12),
        (0.3, None, 128),
        (0.5, (2, 4), 8),
        (0.5, (2, 4), 32),
        (0.5, (4, 8), 16),
        (0.75, (1, 4), 128),
    ],
)
@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_the_walk_is_that_of_the_paper(sparsity: float, pattern: Pattern, block: int, damping: float) -> None:
    for seed in range(3):
        weight, hessian = _weight(seed), _of(_inputs(seed))
        expected = _paper(weight, _damped(hessian, damping), sparsity, pattern, block)
        found = sparsify(
            weight.clone(), hessian, sparsity=sparsity, pattern=pattern, damping=damping, block=block
        )
        assert found.damping == damping
        assert torch.equal(found.weight == 0, expected == 0)
        torch.testing.assert_close(found.weight.double(), expected, rtol=1e-3, atol=1e-4)


def test_with_a_pattern_the_block_changes_the_speed_alone() -> None:
    weight, hessian = _weight(), _of(_inputs())
    first, *others = (
        sparsify(weight.clone(), hessian, pattern=(2, 4), damping=0.01, block=block).weight
        for block in (1, 6, 8, 100)
    )
    for other in others:
        assert torch.equal(first == 0, other == 0)
        torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sparsity", [0.1, 0.333, 0.5, 0.9])
@pytest.mark.parametrize("block", [5, 8, 128])
def test_every_block_of_columns_loses_its_share(sparsity: float, block: int) -> None:
    found = sparsify(_weight(), _of(_inputs()), sparsity=sparsity, damping=0.01, block=block, steps=3).weight
    assert int((found == 0).sum()) == whole(ROWS * COLUMNS, sparsity)
    for start in range(0, COLUMNS, block):
        part = found[:, start : start + block]
        assert abs(int((part == 0).sum()) - part.numel() * sparsity) <= 1


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 2), (3, 16)])
def test_every_run_has_as_many_weights_as_the_pattern_says(pattern: tuple[int, int]) -> None:
    kept, of = pattern
    found = sparsify(_weight(), _of(_inputs()), pattern=pattern, damping=0.01, steps=3).weight
    assert bool(((found.unflatten(1, (-1, of)) != 0).sum(-1) == kept).all())


@pytest.mark.parametrize("steps", [0, 4, 32])
@pytest.mark.parametrize(("sparsity", "pattern"), [(0.5, None), (0.7, None), (0.5, (2, 4))])
def test_moving_the_others_beats_leaving_them(sparsity: float, pattern: Pattern, steps: int) -> None:
    moved, left = 0.0, 0.0
    for seed in range(4):
        weight, inputs = _weight(seed), _inputs(seed)
        found = sparsify(
            weight.clone(), _of(inputs), sparsity=sparsity, pattern=pattern, damping=0.01, steps=steps
        )
        error = _error(weight, found.weight, inputs)
        assert found.output_error == pytest.approx(error, rel=1e-3)
        masked = _error(weight, weight.masked_fill(found.weight == 0, 0), inputs)
        norms = ColumnNorms(COLUMNS)
        norms.add(inputs)
        scores = weight.abs() * norms.norms
        mask = row_mask(scores, sparsity) if pattern is None else pattern_mask(scores, *pattern)
        assert error < masked
        moved += error
        left += _error(weight, weight.masked_fill(~mask, 0), inputs)
    # Which weights go is a heuristic of either method, so a single matrix may turn out either way.
    assert moved < left


def test_more_steps_never_raise_the_error() -> None:
    weight, hessian = _weight(), _of(_inputs())
    errors = [
        sparsify(weight.clone(), hessian, sparsity=0.6, damping=0.0, steps=steps).output_error
        for steps in (0, 1, 2, 4, 8, 16, 32)
    ]
    assert all(after <= before * (1 + 1e-3) for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


# -- the fit at the end ---------------------------------------------------------------------------------


def test_the_fit_ends_at_the_least_squares_solution_of_every_row() -> None:
    weight, hessian = _weight(), _of(_inputs())
    mask = row_mask(_weight(1).abs(), 0.5)
    values = weight.masked_fill(~mask, 0)
    error = weight - values
    refit(values, error, hessian, damping=0.05, steps=200)
    damped = hessian.matrix.double()
    damped = damped + 0.05 * hessian.mean_diagonal * torch.eye(COLUMNS, dtype=torch.float64)
    for row in range(ROWS):
        held = mask[row].nonzero().flatten()
        slope = (damped @ weight[row].double())[held]
        expected = torch.linalg.solve(damped[held][:, held], slope)
        torch.testing.assert_close(values[row, held].double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(values == 0, ~mask)
    torch.testing.assert_close(error, weight - values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_the_fit_never_raises_the_damped_error_of_a_row(steps: int) -> None:
    for seed in range(3):
        weight, hessian = _weight(seed), _of(_inputs(seed))
        damped = hessian.matrix.double()
        damped = damped + 0.01 * hessian.mean_diagonal * torch.eye(COLUMNS, dtype=torch.float64)
        values = _weight(seed + 50).masked_fill(~row_mask(_weight(seed + 9).abs(), 0.6), 0)
        error = weight - values
        before = ((error.double() @ damped) * error.double()).sum(1)
        refit(values, error, hessian, damping=0.01, steps=steps)
        left = (weight - values).double()
        after = ((left @ damped) * left).sum(1)
        assert bool((after <= before * (1 + 1e-5)).all())


def test_no_steps_leave_everything_as_it_is() -> None:
    weight, hessian = _weight(), _of(_inputs())
    values = weight.clone()
    error = torch.ones_like(weight)
    refit(values, error, hessian, damping=0.01, steps=0)
    assert torch.equal(values, weight)
    assert bool((error == 1).all())


# -- what comes in --------------------------------------------------------------------------------------


def test_weights_of_inputs_that_never_came_go_first() -> None:
    inputs = _inputs()
    inputs[:, [3, 20]] = 0
    weight, hessian = _weight(), _of(inputs)
    weight[:, 3] = 100.0
    exact = sparsify(weight.clone(), hessian, sparsity=2 / COLUMNS, damping=0.01)
    assert exact.dead_columns == 2
    assert bool((exact.weight[:, [3, 20]] == 0).all())
    others = [column for column in range(COLUMNS) if column not in (3, 20)]
    torch.testing.assert_close(exact.weight[:, others], weight[:, others])
    assert exact.output_error == 0
    # What of them stays is as it was, refined or not.
    half = sparsify(weight.clone(), hessian, sparsity=1 / COLUMNS, damping=0.01, steps=5)
    assert torch.equal(half.weight[:, 20], weight[:, 20])


def test_an_output_of_zero_has_no_error() -> None:
    found = sparsify(torch.zeros(3, COLUMNS), _of(_inputs()), sparsity=0.5, damping=0.01, steps=3)
    assert found.output_error == 0
    assert bool((found.weight == 0).all())


def test_fewer_tokens_than_columns_are_damped_and_it_is_recorded() -> None:
    found = sparsify(_weight(), _of(_inputs(tokens=3)), sparsity=0.5, damping=0.0, steps=4)
    assert found.damping > 0
    assert bool(torch.isfinite(found.weight).all())


def test_what_cannot_be_pruned_is_an_error() -> None:
    with pytest.raises(ValueError, match="32 columns cannot be divided into runs of 5"):
        sparsify(_weight(), _of(_inputs()), pattern=(2, 5), damping=0.01)
    with pytest.raises(CalibrationError, match="no calibration token"):
        sparsify(_weight(), Hessian(COLUMNS), sparsity=0.5, damping=0.01)


def test_the_same_inputs_give_the_same_bytes() -> None:
    def once() -> Sparsified:
        return sparsify(_weight(), _of(_inputs()), sparsity=0.55, damping=0.01, steps=6)

    assert torch.equal(once().weight, once().weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_zeros_survive_rounding_with_feedback(pattern: Pattern, symmetric: bool) -> None:
    inputs = _inputs(tokens=400)
    hessian, weight = _of(inputs), _weight()
    pruned = sparsify(weight.clone(), hessian, sparsity=0.5, pattern=pattern, damping=0.01, steps=8).weight
    solution = solve(
        pruned.clone(),
        hessian,
        Scheme(4, 16, symmetric),
        torch.bfloat16,
        ranges=Ranges(),
        damping=0.05,
        keep_zeros=True,
    )
    values = solution.quantized.dequantize().float()
    assert bool((values[pruned == 0] == 0).all())
    assert _error(weight, values, inputs) < 1.5 * _error(weight, pruned, inputs) + 0.01


@pytest.mark.gpu
def test_a_gpu_reaches_the_same_error() -> None:
    weight, inputs = _weight(), _inputs()
    on_gpu = Hessian(COLUMNS, "cuda")
    on_gpu.add(inputs.cuda())
    errors = [
        sparsify(matrix, hessian, sparsity=0.5, damping=0.01, steps=8).output_error
        for matrix, hessian in ((weight.clone(), _of(inputs)), (weight.cuda(), on_gpu))
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
