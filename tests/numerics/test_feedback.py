"""Error feedback against a slow float64 reference, and the guarantees of the refinement."""

import math
from dataclasses import replace

import pytest
import torch

from compress.core.scheme import Scheme
from compress.numerics import feedback, grouping
from compress.numerics.affine import ClipSearch, Quantized, choose_scales, round_to_nearest
from compress.numerics.feedback import Ranges, output_error, round_with_feedback, solve
from compress.numerics.hessian import Hessian, Order
from compress.numerics.refinement import refine

ROWS, COLUMNS = 12, 32
SCHEMES = (
    Scheme(2, 8),
    Scheme(3, 16),
    Scheme(4, None),
    Scheme(8, 8),
    Scheme(3, 8, range="narrow"),
    Scheme(3, 8, symmetric=False),
    Scheme(4, None, symmetric=False),
)


def _problem(seed: int = 0, tokens: int = 200) -> tuple[torch.Tensor, Hessian]:
    """A weight, and the Hessian of correlated inputs of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator) / math.sqrt(COLUMNS)
    rows = torch.randn(tokens, COLUMNS, generator=generator) @ (torch.eye(COLUMNS) + 2 * mixing)
    hessian = Hessian(COLUMNS)
    hessian.add(rows * torch.rand(COLUMNS, generator=generator).add(0.2))
    return weight, hessian


def _damped(hessian: Hessian, damping: float) -> torch.Tensor:
    matrix = hessian.matrix.double().clone()
    matrix.diagonal().copy_(hessian.diagonal.double() + damping * hessian.mean_diagonal)
    return matrix


def _brain_surgeon(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    scheme: Scheme,
    damped: torch.Tensor,
    order: list[int],
) -> torch.Tensor:
    """Optimal brain quantization in a given order, as in section 3 of the GPTQ paper, in float64.

    Each step rounds one column, moves all columns that remain by the optimal correction (equation 2) and
    takes the column out of the explicit inverse by Gaussian elimination (equation 3).
    """
    remaining = weight.double().clone()
    inverse = torch.linalg.inv(damped)
    q = torch.zeros(weight.shape, dtype=torch.int8)
    width = weight.shape[1] // scale.shape[1]
    for column in order:
        step = scale[:, column // width].double()
        offset = torch.zeros_like(step) if zero is None else zero[:, column // width].double()
        levels = (torch.round(remaining[:, column] / step) + offset).clamp(scheme.lowest, scheme.highest)
        q[:, column] = levels.to(torch.int8)
        value = ((levels - offset) * step).to(scale.dtype).double()
        error = (remaining[:, column] - value) / inverse[column, column]
        remaining -= torch.outer(error, inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        # What was eliminated must not be touched again; the subtraction leaves rounding errors there.
        inverse[column] = 0
        inverse[:, column] = 0
    return q


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("order", ["static", "none"])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_integers_are_those_of_the_slow_reference(scheme: Scheme, order: Order, storage: torch.dtype) -> None:
    for seed in range(3):
        weight, hessian = _problem(seed)
        scale, zero = choose_scales(weight, scheme, storage)
        # The full range puts the largest weight of a group half-way between two levels, where the last
        # bit decides; a slightly smaller range has no ties.
        scale *= 0.9
        places = list(range(COLUMNS))
        if order == "static":
            places.sort(key=lambda column: -float(hessian.diagonal[column]))
        expected = _brain_surgeon(weight, scale, zero, scheme, _damped(hessian, 0.02), places)
        for block in (5, 128):
            ours = round_with_feedback(weight, scale, zero, scheme, hessian.factor(0.02, order), block)
            ours.check_values()
            assert torch.equal(ours.q, expected)


def test_feedback_lowers_the_error_of_the_output() -> None:
    for seed in range(5):
        for scheme in SCHEMES:
            weight, hessian = _problem(seed)
            nearest = round_to_nearest(weight, scheme, torch.float32)
            factor = hessian.factor(0.01, "static")
            ours = round_with_feedback(weight, nearest.scale, nearest.zero, scheme, factor)
            assert output_error(weight, ours, hessian) < output_error(weight, nearest, hessian)


def test_output_error_is_the_error_on_the_inputs() -> None:
    weight, _ = _problem()
    rows = torch.randn(50, COLUMNS, generator=torch.Generator().manual_seed(5))
    hessian = Hessian(COLUMNS)
    hessian.add(rows)
    ours = round_to_nearest(weight, Scheme(3, 8), torch.bfloat16)
    exact = (rows.double() @ (weight - ours.dequantize().float()).double().T).square().sum()
    expected = exact / (rows.double() @ weight.double().T).square().sum()
    assert output_error(weight, ours, hessian) == pytest.approx(float(expected), rel=1e-4)
    assert output_error(torch.zeros_like(weight), replace(ours, q=torch.zeros_like(ours.q)), hessian) == 0


def test_without_correlation_feedback_is_rounding_to_nearest() -> None:
    weight, _ = _problem()
    hessian = Hessian(COLUMNS)
    hessian.add(torch.eye(COLUMNS) * 3)
    nearest = round_to_nearest(weight, Scheme(3, 8), torch.float32)
    factor = hessian.factor(0.01, "static")
    ours = round_with_feedback(weight, nearest.scale, None, nearest.scheme, factor)
    assert torch.equal(ours.q, nearest.q)


def test_chunks_of_rows_and_stacking_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = _problem()
    other = weight.flip(0) * 2
    scheme, factor = Scheme(3, 8), hessian.factor(0.01, "static")

    def solve(matrix: torch.Tensor) -> Quantized:
        scale, zero = choose_scales(matrix, scheme, torch.bfloat16)
        first = round_with_feedback(matrix, scale, zero, scheme, factor)
        return refine(matrix, first, hessian, damping=0.01, sweeps=1)

    stacked = solve(torch.cat([weight, other]))
    assert torch.equal(stacked.rows(ROWS, 2 * ROWS).q, solve(other).q)
    monkeypatch.setattr(grouping, "HOST_ROWS", 3)
    chunked = solve(torch.cat([weight, other]))
    assert torch.equal(stacked.q, chunked.q)
    assert torch.equal(stacked.scale, chunked.scale)


def test_the_same_inputs_give_the_same_bytes() -> None:
    results = []
    for _ in range(2):
        weight, hessian = _problem()
        scale, zero = choose_scales(weight, Scheme(3, 8), torch.bfloat16, search=ClipSearch(points=9))
        factor = hessian.factor(0.01, "static")
        first = round_with_feedback(weight, scale, zero, Scheme(3, 8), factor)
        results.append(refine(weight, first, hessian, damping=0.01, sweeps=2))
    assert torch.equal(results[0].q, results[1].q)
    assert torch.equal(results[0].scale.view(torch.int16), results[1].scale.view(torch.int16))


def _objective(weight: torch.Tensor, ours: Quantized, damped: torch.Tensor) -> torch.Tensor:
    """The damped error of each row."""
    error = weight.double() - ours.dequantize().double()
    return ((error @ damped) * error).sum(1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scales", [True, False])
def test_refinement_never_raises_the_error_of_a_row(
    scheme: Scheme, storage: torch.dtype, scales: bool
) -> None:
    for seed in range(3):
        weight, hessian = _problem(seed)
        solution = round_to_nearest(weight, scheme, storage)
        damped = _damped(hessian, 0.01)
        before = _objective(weight, solution, damped)
        for _ in range(3):
            solution = refine(weight, solution, hessian, damping=0.01, sweeps=1, scales=scales, block=5)
            solution.check_values()
            after = _objective(weight, solution, damped)
            assert bool((after <= before * (1 + 1e-5)).all())
            before = after


def test_refinement_ends_where_no_single_integer_can_be_improved() -> None:
    weight, hessian = _problem(tokens=400)
    scheme = Scheme(3, 8)
    start = round_to_nearest(weight, scheme, torch.float32)
    final = refine(weight, start, hessian, damping=0.01, sweeps=30, scales=False)
    damped = _damped(hessian, 0.01)
    best = _objective(weight, final, damped)
    for column in range(0, COLUMNS, 5):
        for move in (-1, 1):
            q = final.q.clone()
            q[:, column] = (q[:, column] + move).clamp(scheme.lowest, scheme.highest)
            moved = _objective(weight, replace(final, q=q), damped)
            assert bool((moved >= best * (1 - 1e-5)).all())


def test_fitted_scale_is_the_least_squares_solution() -> None:
    weight, hessian = _problem()
    scheme = Scheme(3, None)
    start = round_to_nearest(weight, scheme, torch.float32)
    fitted = refine(weight, start, hessian, damping=0.0, sweeps=1)
    # With one scale a row, the first step of the sweep is the exact solution; what follows can only
    # improve on it.
    levels, matrix = start.q.double(), hessian.matrix.double()
    exact = ((levels @ matrix) * weight.double()).sum(1) / ((levels @ matrix) * levels).sum(1)
    bound = _objective(weight, replace(start, scale=exact.float().unsqueeze(1)), matrix)
    assert bool((_objective(weight, fitted, matrix) <= bound * (1 + 1e-5)).all())


def test_no_sweeps_leave_the_solution_as_it_is() -> None:
    weight, hessian = _problem()
    start = round_to_nearest(weight, Scheme(3, 8), torch.float32)
    assert refine(weight, start, hessian, damping=0.01, sweeps=0) is start


def test_groups_of_zeros_stay_zero() -> None:
    weight, hessian = _problem()
    weight[:, 8:16] = 0
    weight[3] = 0
    scale, zero = choose_scales(weight, Scheme(3, 8), torch.bfloat16)
    factor = hessian.factor(0.01, "static")
    ours = round_with_feedback(weight, scale, zero, Scheme(3, 8), factor)
    ours = refine(weight, ours, hessian, damping=0.01, sweeps=2)
    ours.check_values()
    assert bool((ours.dequantize()[3] == 0).all())
    assert bool(torch.isfinite(ours.dequantize()).all())


@pytest.mark.parametrize("size", [1e-6, 1.5e4])
def test_refinement_stays_finite_at_the_ends_of_float16(size: float) -> None:
    weight, hessian = _problem()
    weight = weight / weight.abs().max() * size * 4
    scale, zero = choose_scales(weight, Scheme(4, 8), torch.float16)
    factor = hessian.factor(0.01, "static")
    first = round_with_feedback(weight, scale, zero, Scheme(4, 8), factor)
    ours = refine(weight, first, hessian, damping=0.01, sweeps=3)
    ours.check_values()
    assert bool(torch.isfinite(ours.dequantize()).all())
    assert output_error(weight, ours, hessian) <= output_error(weight, first, hessian) * (1 + 1e-3)


def test_what_is_given_is_not_changed() -> None:
    weight, hessian = _problem()
    # Columns as contiguous rows, the layout that is worked on inside.
    weight = weight.T.contiguous().T
    before = weight.clone()
    start = round_to_nearest(weight, Scheme(3, 8), torch.bfloat16)
    copies = start.q.clone(), start.scale.clone()
    factor = hessian.factor(0.01, "static")
    round_with_feedback(weight, start.scale, None, start.scheme, factor)
    refine(weight, start, hessian, damping=0.01, sweeps=1)
    assert torch.equal(weight, before)
    assert torch.equal(start.q, copies[0])
    assert torch.equal(start.scale, copies[1])


@pytest.mark.gpu
def test_a_gpu_reaches_the_same_error() -> None:
    weight, hessian = _problem()
    on_gpu = Hessian(COLUMNS, "cuda")
    on_gpu.add(torch.linalg.cholesky(hessian.matrix.double()).T.float().cuda())
    errors = []
    for matrix, statistic in ((weight, hessian), (weight.cuda(), on_gpu)):
        scale, zero = choose_scales(matrix, Scheme(3, 8), torch.bfloat16)
        factor = statistic.factor(0.01, "static")
        first = round_with_feedback(matrix, scale, zero, Scheme(3, 8), factor)
        ours = refine(matrix, first, statistic, damping=0.01, sweeps=2)
        errors.append(output_error(matrix, ours, statistic))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("clip", ["none", "mse", "hessian"])
def test_solving_chooses_ranges_then_feeds_back_then_refines(clip: str) -> None:
    weight, hessian = _problem()
    hessian._sum[:, 3] = hessian._sum[3, :] = 0
    scheme = Scheme(3, 8)
    ranges = Ranges(clip, signed=clip == "mse")  # type: ignore[arg-type]
    solution = solve(
        weight.clone(), hessian, scheme, torch.bfloat16, ranges=ranges, damping=0.1, sweeps=2, block=16
    )
    weight[:, 3] = 0
    search = None if clip == "none" else ClipSearch(points=feedback.SEARCHED, signed=clip == "mse")
    importance = hessian.factor(0.1, "static").importance if clip == "hessian" else None
    scale, zero = choose_scales(weight, scheme, torch.bfloat16, search=search, importance=importance)
    fed = round_with_feedback(weight, scale, zero, scheme, hessian.factor(0.1, "static"), 16)
    expected = refine(weight, fed, hessian, damping=0.1, sweeps=2, block=16)
    assert torch.equal(solution.quantized.q, expected.q)
    assert torch.equal(solution.quantized.scale, expected.scale)
    assert (solution.damping, solution.dead_columns) == (0.1, 1)


@pytest.mark.parametrize("order", ["static", "none"])
def test_importance_is_what_an_error_costs_in_the_end(order: Order) -> None:
    _, hessian = _problem()
    factor = hessian.factor(0.02, order)
    damped = _damped(hessian, 0.02)
    for column in (0, 7, COLUMNS - 1):
        place = factor.order.tolist().index(column)
        # One unit of error enters at the column, and those that are rounded after it make up for it.
        after = factor.order[:place]
        cost = damped[column, column]
        if place:
            made_up = torch.linalg.solve(damped[after][:, after], damped[after, column])
            cost = cost - damped[column, after] @ made_up
        assert float(factor.importance[column]) == pytest.approx(float(cost), rel=1e-4)


def test_wide_groups_are_searched_with_the_diagonal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _, hessian = _problem()
    monkeypatch.setattr(feedback, "WIDEST_BLOCK", 16)
    narrow, wide = (Ranges().importance(hessian, Scheme(4, group), 0.05) for group in (16, None))
    assert narrow is not None
    assert wide is not None
    assert torch.equal(narrow, hessian.blocks(16, 0.05))
    assert torch.equal(wide, hessian.diagonal)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zeros_are_kept_and_the_others_make_up_for_it(scheme: Scheme) -> None:
    kept, nearest = 0.0, 0.0
    for seed in range(3):
        weight, hessian = _problem(seed)
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5] = 0
        scale, zero = choose_scales(weight, scheme, torch.float32)
        factor = hessian.factor(0.02, "static")
        fed = round_with_feedback(weight, scale, zero, scheme, factor, 5, keep_zeros=True)
        fed.check_values()
        assert bool((fed.dequantize()[weight == 0] == 0).all())
        refined = refine(weight, fed, hessian, damping=0.02, sweeps=3, block=5, keep_zeros=True)
        refined.check_values()
        assert bool((refined.dequantize()[weight == 0] == 0).all())
        assert output_error(weight, refined, hessian) <= output_error(weight, fed, hessian) * (1 + 1e-2)
        kept += output_error(weight, refined, hessian)
        nearest += output_error(weight, round_to_nearest(weight, scheme, torch.float32), hessian)
        free = round_with_feedback(weight, scale, zero, scheme, factor, 5)
        assert bool((free.dequantize()[weight == 0] != 0).any())
    assert kept < nearest


def test_nothing_changes_where_there_are_no_zeros_to_keep() -> None:
    weight, hessian = _problem()
    plain, keeping = (
        solve(
            weight.clone(),
            hessian,
            Scheme(3, 8),
            torch.bfloat16,
            ranges=Ranges(),
            damping=0.1,
            keep_zeros=keep,
        ).quantized
        for keep in (False, True)
    )
    assert torch.equal(plain.q, keeping.q)
    assert torch.equal(plain.scale, keeping.scale)
