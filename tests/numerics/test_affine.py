"""Affine quantization against hand-made figures, properties, and the reader of the stored format."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from compress.core.errors import ModelError
from compress.core.scheme import Range, Scheme
from compress.numerics.affine import ClipSearch, Quantized, choose_scales, quantize, round_to_nearest

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _weights(rows: int = 24, columns: int = 64, seed: int = 0) -> torch.Tensor:
    """Rows of very different size, one of zeros, one with a single outlier."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.logspace(-4, 2, rows).unsqueeze(1)
    weight[1] = 0
    weight[2, 3] *= 50
    return weight


@st.composite
def _schemes(draw: st.DrawFn) -> Scheme:
    return Scheme(
        bits=draw(st.sampled_from([2, 3, 4, 8])),
        group_size=draw(st.sampled_from([None, 8, 16])),
        symmetric=draw(st.booleans()),
        range=draw(st.sampled_from(["narrow", "full"])),
    )


@st.composite
def _matrices(draw: st.DrawFn) -> torch.Tensor:
    values = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
    rows = draw(st.integers(1, 3))
    return torch.tensor(
        draw(st.lists(st.lists(values, min_size=16, max_size=16), min_size=rows, max_size=rows))
    )


@pytest.mark.parametrize(
    ("bits", "symmetric", "group", "dtype"),
    list(itertools.product([2, 3, 4, 8], [True, False], [16, None], DTYPES)),
)
def test_dequantize_is_bit_for_bit_what_compressed_tensors_loads(
    bits: int, symmetric: bool, group: int | None, dtype: torch.dtype
) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    ours = round_to_nearest(_weights(), Scheme(bits, group, symmetric), dtype)
    arguments = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy="group" if group else "channel", group_size=group
    )
    theirs = dequantize(ours.q, ours.scale, ours.zero, arguments)
    assert ours.dequantize().dtype == theirs.dtype == dtype
    assert torch.equal(ours.dequantize(), theirs)


@pytest.mark.parametrize(
    ("scheme", "scale", "zero", "q"),
    [
        # amax / 7, levels -7..7
        (Scheme(4, None, range="narrow"), 1.0, None, [-7, 2, 2, 4]),
        # amax / 7.5, levels -8..7; -7.0 / 0.9333 = -7.5, a tie that goes to the even -8
        (Scheme(4, None, range="full"), 7 / 7.5, None, [-8, 2, 3, 4]),
        # (4 + 7) / 15, zero point -8 + 7 / 0.7333 = 1.545 -> 2
        (Scheme(4, None, symmetric=False), 11 / 15, 2, [-8, 4, 5, 7]),
    ],
)
def test_figures_worked_by_hand(scheme: Scheme, scale: float, zero: int | None, q: list[int]) -> None:
    ours = round_to_nearest(torch.tensor([[-7.0, 1.5, 2.5, 4.0]]), scheme, torch.float32)
    assert ours.scale.item() == pytest.approx(scale, rel=1e-6)
    assert ours.q.tolist() == [q]
    assert (ours.zero is None) if zero is None else (ours.zero is not None and ours.zero.item() == zero)


def test_ties_go_to_even() -> None:
    scale = torch.ones(1, 1)
    q = quantize(torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5]]), scale, None, Scheme(4, None))
    assert q.tolist() == [[0, 2, 2, 0, -2]]


@settings(max_examples=50)
@given(weight=_matrices(), scheme=_schemes())
def test_within_the_range_the_error_is_at_most_half_a_step(weight: torch.Tensor, scheme: Scheme) -> None:
    ours = round_to_nearest(weight, scheme, torch.float32)
    ours.check_values()
    width = weight.shape[1] // ours.groups
    step = ours.scale.repeat_interleave(width, 1).double()
    zero = 0.0 if ours.zero is None else ours.zero.repeat_interleave(width, 1).double()
    low, high = (scheme.lowest - zero) * step, (scheme.highest - zero) * step
    inside = weight.double().clamp(low, high)
    error = (ours.dequantize().double() - inside).abs()
    assert bool((error <= step * (0.5 + 1e-5)).all())
    if scheme.range == "narrow" or not scheme.symmetric:
        # These conventions hold every weight: a value outside the levels is at most the rounding of the
        # zero point away.
        assert bool(((inside - weight.double()).abs() <= step * (0.5 + 1e-5)).all())


@settings(max_examples=50)
@given(weight=_matrices(), scheme=_schemes(), dtype=st.sampled_from(DTYPES))
def test_quantizing_a_dequantized_matrix_changes_nothing(
    weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype
) -> None:
    # Up to 255 steps from zero do not have a value each in bfloat16, whose significand has 8 bits.
    assume(dtype != torch.bfloat16 or scheme.symmetric or scheme.bits < 8)
    ours = round_to_nearest(weight, scheme, dtype)
    again = quantize(ours.dequantize(), ours.scale, ours.zero, scheme)
    assert torch.equal(again, ours.q)


@settings(max_examples=50)
@given(weight=_matrices(), scheme=_schemes())
def test_zero_is_held_exactly(weight: torch.Tensor, scheme: Scheme) -> None:
    weight[:, ::3] = 0
    assert bool((round_to_nearest(weight, scheme, torch.bfloat16).dequantize()[:, ::3] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [None, ClipSearch(points=5)])
def test_a_group_of_zeros_gets_a_usable_scale_and_comes_back_as_zeros(
    dtype: torch.dtype, symmetric: bool, search: ClipSearch | None
) -> None:
    ours = round_to_nearest(torch.zeros(2, 8), Scheme(4, 4, symmetric), dtype, search=search)
    ours.check_values()
    assert bool((ours.dequantize() == 0).all())


@pytest.mark.parametrize(
    "scheme", [Scheme(4, None, range=r) for r in ("narrow", "full")] + [Scheme(4, None, False)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-38, 1e-9, 1e-7, 6e4, 3e38])
def test_extreme_weights_give_finite_scales_and_values(
    scheme: Scheme, dtype: torch.dtype, size: float
) -> None:
    weight = torch.tensor([[-1.0, -0.3, 0.5, 1.0]]) * size
    ours = round_to_nearest(weight, scheme, dtype)
    ours.check_values()
    assert bool(torch.isfinite(ours.dequantize()).all())


def test_small_weights_in_float16_use_subnormal_scales() -> None:
    weight = torch.tensor([[-1.0, 0.25, 0.5, 1.0]]) * 1e-3
    ours = round_to_nearest(weight, Scheme(8, None, range="narrow"), torch.float16)
    assert 0 < ours.scale.item() < torch.finfo(torch.float16).smallest_normal
    assert torch.allclose(ours.dequantize().float(), weight, atol=2e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.ones(3, 4)
    weight[1, 2] = bad
    with pytest.raises(ModelError, match="1 weights of the matrix are NaN or infinite"):
        round_to_nearest(weight, Scheme(4, None), torch.float32)


def test_integers_are_chosen_for_the_stored_scale() -> None:
    weight = _weights()
    scheme = Scheme(8, None, range="narrow")
    scale, _ = choose_scales(weight, scheme, torch.bfloat16)
    expected = torch.round(weight.double() / scale.double()).clamp(-127, 127)
    assert torch.equal(quantize(weight, scale, None, scheme).double(), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("range_", ["narrow", "full"])
def test_clip_search_finds_the_best_shrink_factor(symmetric: bool, range_: Range) -> None:
    weight, scheme = _weights(), Scheme(3, 16, symmetric, range_)
    search = ClipSearch(points=9, smallest=0.3)
    best = torch.full((24, 4), math.inf)
    for factor in search.factors():
        shrunk = _shrunk(weight, factor, scheme)
        best = torch.minimum(best, _group_errors(weight, shrunk))
    found = _group_errors(weight, round_to_nearest(weight, scheme, torch.float32, search=search))
    assert torch.allclose(found, best, rtol=1e-4)


def _shrunk(weight: torch.Tensor, factor: float, scheme: Scheme) -> Quantized:
    """Rounded on the grid of weights clipped to a share of the extremes."""
    values = weight.view(24, 4, 16)
    low = values.amin(-1, keepdim=True).clamp(max=0) * factor
    high = values.amax(-1, keepdim=True).clamp(min=0) * factor
    if scheme.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    clipped = values.clamp(low, high).flatten(1)
    scale, zero = choose_scales(clipped, scheme, torch.float32)
    return Quantized(quantize(weight, scale, zero, scheme), scale, zero, scheme)


def _group_errors(weight: torch.Tensor, ours: Quantized) -> torch.Tensor:
    return (ours.dequantize() - weight).square().view(24, 4, 16).sum(-1)


def test_importance_moves_the_range_to_the_columns_that_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(16, 32, generator=generator)
    weight[:, 5] *= 4
    importance = torch.ones(32)
    importance[5] = 1e4
    scheme, search = Scheme(3, None), ClipSearch()
    plain = round_to_nearest(weight, scheme, torch.float32, search=search).dequantize() - weight
    weighted = (
        round_to_nearest(weight, scheme, torch.float32, search=search, importance=importance).dequantize()
        - weight
    )
    assert weighted[:, 5].square().sum() < plain[:, 5].square().sum()
    assert (weighted.square() * importance).sum() < (plain.square() * importance).sum()


def test_chunks_of_rows_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scheme = _weights(), Scheme(3, 16, False)
    whole = round_to_nearest(weight, scheme, torch.bfloat16, search=ClipSearch(points=7))
    from compress.numerics import affine, grouping

    monkeypatch.setattr(affine, "row_chunks", lambda matrix, *_: grouping.row_chunks(matrix, 200))
    parts = round_to_nearest(weight, scheme, torch.bfloat16, search=ClipSearch(points=7))
    assert torch.equal(whole.q, parts.q)
    assert torch.equal(whole.scale, parts.scale)


def test_rows_give_back_the_layers_that_were_stacked() -> None:
    first, second = _weights(seed=1), _weights(seed=2)
    scheme = Scheme(4, 16, symmetric=False)
    stacked = round_to_nearest(torch.cat([first, second]), scheme, torch.bfloat16)
    alone = round_to_nearest(second, scheme, torch.bfloat16)
    part = stacked.rows(24, 48)
    assert part.shape == (24, 64)
    assert part.groups == 4
    assert torch.equal(part.dequantize(), alone.dequantize())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 8)}, "q must be int8"),
        ({"q": torch.zeros(2, 6, dtype=torch.int8)}, "cannot be divided"),
        ({"scale": torch.ones(2, 3)}, r"scale must be a float \[2, 2\], got float32 \[2, 3\]"),
        ({"scale": torch.ones(2, 2, dtype=torch.int8)}, "scale must be a float"),
        ({"zero": torch.zeros(2, 2, dtype=torch.int8)}, "takes no zero point"),
        ({"scheme": Scheme(4, 4, symmetric=False)}, "takes a zero point"),
        (
            {"scheme": Scheme(4, 4, symmetric=False), "zero": torch.zeros(2, 2)},
            "zero must be int8",
        ),
    ],
)
def test_contradictions_are_refused(change: dict[str, object], message: str) -> None:
    parts = {
        "q": torch.zeros(2, 8, dtype=torch.int8),
        "scale": torch.ones(2, 2),
        "zero": None,
        "scheme": Scheme(4, 4),
    }
    with pytest.raises(ValueError, match=message):
        Quantized(**{**parts, **change})  # type: ignore[arg-type]


def test_values_out_of_range_are_found() -> None:
    sound = round_to_nearest(_weights(), Scheme(4, 16, range="narrow"), torch.float32)
    outside = sound.q.clone()
    outside[3, 3] = -8
    with pytest.raises(ValueError, match=r"q spans \[-8, 7\]"):
        Quantized(outside, sound.scale, None, sound.scheme).check_values()
    for bad in (0.0, math.nan, math.inf):
        scale = sound.scale.clone()
        scale[0, 0] = bad
        with pytest.raises(ValueError, match="zero or not finite"):
            Quantized(sound.q, scale, None, sound.scheme).check_values()
