"""GPTQ as a pass: its options, its failures, and what its defaults gain."""

import itertools
import math

import pytest
import torch

from compress.core.errors import CalibrationError, ModelError
from compress.core.scheme import Scheme
from compress.numerics.affine import round_to_nearest
from compress.numerics.feedback import output_error
from compress.numerics.hessian import Hessian
from compress.numerics.statistic import Statistic
from compress.quantize.gptq import Gptq
from compress.quantize.rtn import Rtn
from tests.marks import slow_but

ROWS, COLUMNS = 24, 64


class _Counter(Statistic):
    """A statistic that is no Hessian."""

    def add(self, rows: torch.Tensor) -> None:
        self.tokens += rows.shape[0]


def _weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def _inputs(seed: int = 0, tokens: int = 500) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator) / math.sqrt(COLUMNS)
    return torch.randn(tokens, COLUMNS, generator=generator) @ (torch.eye(COLUMNS) + 2 * mixing)


def _hessian(seed: int = 0) -> Hessian:
    hessian = Hessian(COLUMNS)
    hessian.add(_inputs(seed))
    return hessian


@pytest.mark.parametrize(
    ("bits", "symmetric", "group"),
    slow_but(
        [(2, False, 16), (3, True, "channel"), (4, True, 16), (4, False, "channel"), (8, False, 16)],
        itertools.product([2, 3, 4, 8], [True, False], [16, "channel"]),
    ),
)
def test_it_beats_rounding_to_nearest_at_its_best(bits: int, symmetric: bool, group: int | str) -> None:
    options = {"bits": bits, "group_size": group, "symmetric": symmetric}
    gptq, rtn = Gptq(**options), Rtn(**options, clip="mse", integer_range="full")
    for seed in range(2):
        hessian = _hessian(seed)
        ours = gptq.round(_weight(seed), hessian, gptq.scheme_for("layer"), torch.bfloat16)
        theirs = rtn.round(_weight(seed), None, rtn.scheme_for("layer"), torch.bfloat16)
        ours.quantized.check_values()
        error = output_error(_weight(seed), ours.quantized, hessian)
        assert ours.notes["output_error"] == pytest.approx(error)
        if bits < 8:
            assert error < 0.7 * output_error(_weight(seed), theirs.quantized, hessian)
        else:
            # The rounding of the weights to bfloat16 itself is the larger part of the error here.
            assert error < output_error(_weight(seed), theirs.quantized, hessian)


@pytest.mark.parametrize("clip", ["none", "mse", "hessian"])
@pytest.mark.parametrize("order", ["static", "none"])
@pytest.mark.parametrize("integer_range", ["full", "narrow"])
def test_every_combination_of_options_works(clip: str, order: str, integer_range: str) -> None:
    method = Gptq(bits=3, group_size=16, clip=clip, activation_order=order, integer_range=integer_range)
    hessian = _hessian()
    rounded = method.round(_weight(), hessian, method.scheme_for("layer"), torch.float16)
    rounded.quantized.check_values()
    nearest = round_to_nearest(_weight(), method.scheme_for("layer"), torch.float16)
    assert rounded.notes["output_error"] < output_error(_weight(), nearest, hessian)


def test_each_addition_to_the_paper_lowers_the_error() -> None:
    steps = [
        {"clip": "none", "signed_scales": False, "refinement": 0},
        {"clip": "hessian", "signed_scales": False, "refinement": 0},
        {"clip": "hessian", "signed_scales": True, "refinement": 0},
        {"clip": "hessian", "signed_scales": True, "refinement": 2},
    ]
    errors = []
    for options in steps:
        method = Gptq(bits=2, group_size=16, **options)
        total = 0.0
        for seed in range(2):
            rounded = method.round(_weight(seed), _hessian(seed), method.scheme_for("layer"), torch.float32)
            total += float(rounded.notes["output_error"])
        errors.append(total)
    assert errors == sorted(errors, reverse=True)


def test_scales_are_negative_only_where_asked_for() -> None:
    for signed, expected in ((True, True), (False, False)):
        method = Gptq(bits=2, group_size=16, signed_scales=signed)
        rounded = method.round(_weight(), _hessian(), method.scheme_for("layer"), torch.float32)
        assert bool((rounded.quantized.scale < 0).any()) is expected


def test_a_dead_column_gets_zeros_and_is_counted() -> None:
    rows = _inputs()
    rows[:, [5, 40]] = 0
    hessian = Hessian(COLUMNS)
    hessian.add(rows)
    method = Gptq(bits=4, group_size=16)
    rounded = method.round(_weight(), hessian, method.scheme_for("layer"), torch.bfloat16)
    assert rounded.notes["dead_columns"] == 2
    assert bool((rounded.quantized.dequantize()[:, [5, 40]] == 0).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ["static", "none"])
def test_zeros_of_a_pruned_matrix_stay_zero(symmetric: bool, order: str) -> None:
    pruned = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(7)) < 0.5
    options = {"bits": 4, "group_size": 16, "symmetric": symmetric, "activation_order": order}
    kept, free = (
        Gptq(**options, keep_zeros=keep).round(
            _weight().masked_fill(pruned, 0), _hessian(), Scheme(4, 16, symmetric), torch.bfloat16
        )
        for keep in (True, False)
    )
    assert bool((kept.quantized.dequantize()[pruned] == 0).all())
    assert bool((free.quantized.dequantize()[pruned] != 0).any())
    nearest = round_to_nearest(_weight().masked_fill(pruned, 0), Scheme(4, 16, symmetric), torch.bfloat16)
    assert kept.notes["output_error"] < output_error(_weight().masked_fill(pruned, 0), nearest, _hessian())


def test_damping_recovers_and_is_recorded() -> None:
    hessian = Hessian(COLUMNS)
    hessian.add(_inputs(tokens=4))
    method = Gptq(bits=4, group_size=16, damping=0.0)
    rounded = method.round(_weight(), hessian, method.scheme_for("layer"), torch.bfloat16)
    assert float(rounded.notes["damping"]) > 0
    assert bool(torch.isfinite(rounded.quantized.dequantize()).all())


def test_a_layer_without_data_is_an_error() -> None:
    method = Gptq(group_size=16)
    with pytest.raises(CalibrationError, match="no calibration token"):
        method.round(_weight(), Hessian(COLUMNS), Scheme(4, 16), torch.bfloat16)


def test_another_statistic_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="needs the Hessian of the layer's input, got _Counter"):
        Gptq(group_size=16).round(_weight(), _Counter(), Scheme(4, 16), torch.bfloat16)


def test_an_embedding_is_rounded_to_nearest() -> None:
    method, nearest = Gptq(bits=4, group_size=16, clip="mse"), Rtn(clip="mse", integer_range="full")
    ours = method.round(_weight(), None, Scheme(4, 16), torch.bfloat16)
    theirs = nearest.round(_weight(), None, Scheme(4, 16), torch.bfloat16)
    error = (ours.quantized.dequantize() - _weight()).square().sum()
    assert not ours.notes
    assert error <= (theirs.quantized.dequantize() - _weight()).square().sum()


def test_weights_that_are_not_finite_are_an_error() -> None:
    weight = _weight()
    weight[0, 0] = math.nan
    with pytest.raises(ModelError, match="NaN"):
        Gptq(group_size=16).round(weight, _hessian(), Scheme(4, 16), torch.bfloat16)


def test_layers_that_share_an_input_may_come_one_by_one_or_stacked() -> None:
    method, hessian = Gptq(bits=3, group_size=16), _hessian()
    scheme = method.scheme_for("layer")
    stacked = method.round(torch.cat([_weight(1), _weight(2)]), hessian, scheme, torch.bfloat16).quantized
    single = method.round(_weight(2), hessian, scheme, torch.bfloat16).quantized
    assert torch.equal(stacked.rows(ROWS, 2 * ROWS).q, single.q)
    assert torch.equal(stacked.rows(ROWS, 2 * ROWS).scale, single.scale)


def test_the_same_inputs_give_the_same_bytes() -> None:
    method = Gptq(bits=3, group_size=16)
    first, second = (
        method.round(_weight(), _hessian(), method.scheme_for("layer"), torch.bfloat16).quantized
        for _ in range(2)
    )
    assert torch.equal(first.q, second.q)
    assert torch.equal(first.scale, second.scale)


def test_the_module_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, compress.quantize.gptq, compress.quantize.rtn; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
