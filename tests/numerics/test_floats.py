"""Small floats against torch's own casts, brute force over all code points, and the reader of the format."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from compress.core.errors import ModelError
from compress.core.scheme import FLOAT_LAYOUTS, Format, Scheme
from compress.numerics.affine import ClipSearch
from compress.numerics.floats import (
    E4M3,
    QuantizedFloats,
    from_e2m1,
    pack_nibbles,
    round_to_floats,
    tensor_scale,
    to_e2m1,
    to_e4m3,
    unpack_nibbles,
)

FORMATS: tuple[Format, ...] = ("fp8", "nvfp4", "mxfp4")
PRESETS = {"fp8": "FP8_DYNAMIC", "nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16"}
PACKINGS = {"fp8": "float-quantized", "nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized"}


def scheme_of(name: Format) -> Scheme:
    bits, group = FLOAT_LAYOUTS[name]
    return Scheme(bits, group, format=name)


def weights(rows: int = 12, columns: int = 64, seed: int = 0) -> torch.Tensor:
    """Rows of very different size, one with a single outlier."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.logspace(-2, 1, rows).unsqueeze(1)
    weight[2, 3] *= 50
    return weight


def _nearest(values: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """By brute force: the index of the nearest point, of two the one with the even index."""
    distance = (values.double().unsqueeze(-1) - points.double()).abs()
    even_first = distance + (torch.arange(len(points)) % 2) * 1e-12
    return even_first.argmin(-1)


def test_e4m3_is_the_nearest_of_all_its_numbers() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    points = every[:127]  # positive and finite, in order; the index of a number is its bits
    values = torch.cat([points, (points[1:] + points[:-1]) / 2, torch.rand(4000) * 500, torch.tensor([1e9])])
    assert torch.equal(to_e4m3(values).float(), points[_nearest(values.clamp(max=448), points)])
    assert torch.equal(to_e4m3(-values).float(), -to_e4m3(values).float())


def test_e2m1_is_the_nearest_of_all_its_numbers_and_the_library_says_the_same() -> None:
    points = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat([points, (points[1:] + points[:-1]) / 2, torch.rand(4001) * 8])
    codes = to_e2m1(values)
    assert torch.equal(codes.long(), _nearest(values.clamp(max=6), points))
    assert torch.equal(from_e2m1(codes), points[codes.long()])
    both = torch.cat([values, -values])
    library = FP4_E2M1_DATA.cast_to_fp4(both.clamp(-6, 6).clone())
    assert torch.equal(from_e2m1(to_e2m1(both)), library)
    packed = pack_fp4_to_uint8(library.reshape(2, -1))
    assert torch.equal(pack_nibbles(to_e2m1(both).reshape(2, -1)), packed)


def test_nibbles_go_there_and_back_as_the_library_reads_them() -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(4, 64) % 16
    packed = pack_nibbles(codes)
    assert packed.shape == (4, 32)
    assert packed[0, 1] == 2 + 16 * 3
    assert torch.equal(unpack_nibbles(packed), codes)
    assert torch.equal(unpack_fp4_from_uint8(packed, 4, 64, torch.float32), from_e2m1(codes))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_numbers_and_scales_are_those_of_the_library(name: Format, storage: torch.dtype) -> None:
    weight = weights().to(storage).float()
    ours = round_to_floats(weight, scheme_of(name), storage)
    theirs = preset_name_to_scheme(PRESETS[name], ["Linear"])
    assert theirs.weights is not None
    grouped = weight.unflatten(1, (-1, theirs.weights.group_size or weight.shape[1]))
    whole = generate_gparam(weight.amin(), weight.amax()) if name == "nvfp4" else None
    scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), theirs.weights, global_scale=whole)
    local = {"weight": weight, "weight_scale": scale.to(storage) if name == "fp8" else scale}
    if whole is not None:
        local["weight_global_scale"] = whole
        assert ours.scheme.tensor_scale == pytest.approx(float(whole), rel=1e-7)
    packing = BaseCompressor.get_value_from_registry(PACKINGS[name])
    stored = packing.compress(local, theirs)
    written = ours.codes if name == "fp8" else pack_nibbles(ours.codes)
    assert torch.equal(
        written.view(torch.uint8), stored["weight" if name == "fp8" else "weight_packed"].view(torch.uint8)
    )
    assert torch.equal(ours.scale.float(), stored["weight_scale"].float())
    back = packing.decompress(stored, theirs)["weight"]
    assert torch.equal(ours.dequantize(), back.to(storage))


@pytest.mark.parametrize("name", FORMATS)
def test_errors_are_within_half_a_step_of_the_largest_number(name: Format) -> None:
    weight = weights()
    matrix = round_to_floats(weight, scheme_of(name), torch.float32)
    width = matrix.scheme.group_size or weight.shape[1]
    largest = weight.unflatten(1, (-1, width)).abs().amax(-1, keepdim=True)
    # The widest step lies next to the largest number: 32 of 448, and 2 of 6 (or of 3.5, where a power of
    # two was rounded up), with the rounding of the scale and that of bfloat16 on top.
    share = {"fp8": 16 / 448, "nvfp4": 1 / 6 * 1.13, "mxfp4": 1 / 3.5}[name]
    error = (matrix.dequantize() - weight).unflatten(1, (-1, width)).abs()
    assert bool((error <= share * largest * 1.01).all())


@pytest.mark.parametrize("name", FORMATS)
def test_a_search_never_raises_the_squared_error(name: Format) -> None:
    weight = weights(seed=1)
    width = FLOAT_LAYOUTS[name][1] or weight.shape[1]
    errors = [
        (round_to_floats(weight, scheme_of(name), torch.float32, search=search).dequantize() - weight)
        .square()
        .unflatten(1, (-1, width))
        .sum(-1)
        for search in (None, ClipSearch())
    ]
    # 4-bit values come back in bfloat16, which the search does not look at.
    assert bool((errors[1] <= errors[0] * 1.02).all())
    assert float(errors[1].sum()) < float(errors[0].sum())


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_and_tiny_groups_come_back_finite(name: Format) -> None:
    weight = torch.zeros(2, 64)
    weight[1, 0] = 1e-30
    weight[1, 40] = 2.0
    back = round_to_floats(weight, scheme_of(name), torch.bfloat16).dequantize()
    assert bool((back[0] == 0).all())
    assert bool(torch.isfinite(back).all())
    assert float(back[1, 40]) == pytest.approx(2.0, rel=0.01)


def test_matrices_of_one_kernel_share_the_scale_of_the_tensor() -> None:
    first, second = weights(seed=2), weights(seed=3) / 100
    shared = replace(scheme_of("nvfp4"), tensor_scale=tensor_scale(float(first.abs().max())))
    alone = round_to_floats(second, scheme_of("nvfp4"), torch.float32)
    together = round_to_floats(second, shared, torch.float32)
    assert together.scheme.tensor_scale == shared.tensor_scale != alone.scheme.tensor_scale
    distance = (together.dequantize() - second).norm() / second.norm()
    assert float(distance) == pytest.approx(
        float((alone.dequantize() - second).norm() / second.norm()), rel=0.2
    )


def test_rows_and_parts_make_the_same_matrix() -> None:
    matrix = round_to_floats(weights(), scheme_of("nvfp4"), torch.bfloat16)
    matrix.check_values()
    again = QuantizedFloats.of(matrix.parts(), matrix.scheme, torch.bfloat16)
    assert torch.equal(again.rows(3, 7).dequantize(), matrix.dequantize()[3:7])
    assert matrix.shape == (12, 64)


def test_what_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="no floats"):
        QuantizedFloats(torch.zeros(1, 8), torch.ones(1, 1), Scheme(8, None), torch.float32)
    with pytest.raises(ValueError, match="codes must be"):
        QuantizedFloats(torch.zeros(1, 8), torch.ones(1, 1), scheme_of("fp8"), torch.float32)
    with pytest.raises(ValueError, match="scale must be"):
        QuantizedFloats(torch.zeros(1, 8).to(E4M3), torch.ones(1, 2), scheme_of("fp8"), torch.float32)
    with pytest.raises(ValueError, match="whole matrix"):
        QuantizedFloats(
            torch.zeros(1, 16, dtype=torch.uint8),
            torch.ones(1, 1).to(E4M3),
            scheme_of("nvfp4"),
            torch.float32,
        )
    with pytest.raises(ModelError, match="NaN or infinite"):
        round_to_floats(torch.full((1, 8), torch.nan), scheme_of("fp8"), torch.float32)
    for bits, group, options in (
        (4, None, {"format": "fp8"}),
        (4, 32, {"format": "nvfp4"}),
        (4, 16, {"format": "nvfp4", "symmetric": False}),
        (4, 32, {"format": "mxfp4", "activations": "static"}),
        (8, None, {"tensor_scale": 1.0}),
    ):
        with pytest.raises(ValueError, match=r"does not come as|has no"):
            Scheme(bits, group, **options)


def test_values_that_the_format_does_not_have_are_found() -> None:
    four = round_to_floats(weights(), scheme_of("mxfp4"), torch.bfloat16)
    eight = round_to_floats(weights(), scheme_of("fp8"), torch.bfloat16)
    for matrix in (four, eight):
        matrix.check_values()
    nan = torch.full_like(eight.codes.view(torch.uint8), 0x7F).view(E4M3)
    broken = (
        (replace(four, codes=four.codes + 16), "4-bit floats have 16"),
        (replace(four, scale=torch.full_like(four.scale, 255)), "zero or not finite"),
        (replace(eight, codes=nan), "NaN"),
        (replace(eight, scale=torch.zeros_like(eight.scale)), "zero or not finite"),
    )
    for matrix, message in broken:
        with pytest.raises(ValueError, match=message):
            matrix.check_values()
