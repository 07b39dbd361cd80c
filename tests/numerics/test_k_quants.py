"""The search for super-blocks, against brute force, other programs' formats and its own bounds."""

from itertools import pairwise, product

import gguf
import pytest
import torch

from compress.numerics.k_quants import KINDS, KQuant, quantize

BITS_PER_WEIGHT = {"Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> KQuant:
    return request.param


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(weight: torch.Tensor, value: torch.Tensor) -> float:
    return float((value.reshape_as(weight) - weight).square().sum() / weight.square().sum())


def test_values_that_the_format_holds_come_back(kind: KQuant) -> None:
    """What was rounded once is on the grid, and rounding it again loses little: units are found anew."""
    weight = quantize(normal(4, 512), kind).value().reshape(4, 512)
    assert relative_error(weight, quantize(weight, kind).value()) < 1e-3


def test_each_bit_more_takes_the_error_down() -> None:
    weight = normal(16, 1024)
    errors = [relative_error(weight, quantize(weight, kind).value()) for kind in KINDS]
    for larger, smaller in pairwise(errors):
        # An ideal quantizer gains 6 dB, a factor of 4, with each bit; k-quants differ in their blocks too.
        assert smaller < larger / 2.5
    # Shannon: no code of R bits a weight describes a Gaussian with less than 2^(-2R) of its energy.
    for error, bits in zip(errors, BITS_PER_WEIGHT.values(), strict=True):
        assert error > 2 ** (-2 * bits)


@pytest.mark.parametrize(("kind", "plain"), [("Q4_K", "Q4_0"), ("Q5_K", "Q5_0"), ("Q4_K", "Q4_1")])
def test_better_than_the_plain_types_of_the_package(kind: KQuant, plain: str) -> None:
    """Q4_K has 4.5 bits as Q4_0 has, and 0.5 fewer than Q4_1."""
    weight = normal(16, 1024, seed=3)
    qtype = gguf.GGMLQuantizationType[plain]
    read = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), qtype), qtype))
    assert relative_error(weight, quantize(weight, kind).value()) < 0.9 * relative_error(weight, read)


def test_a_block_is_as_good_as_brute_force_on_a_grid() -> None:
    """Q2_K, a super-block in which one block has all the weights: the best of all scales and minima."""
    weight = torch.zeros(1, 256)
    weight[0, :16] = normal(16, seed=5)
    found = float((quantize(weight, "Q2_K").value() - weight).square().sum())
    least = float("inf")
    low, width = float(weight.min()), float(weight.max() - weight.min())
    for wide, shift in product(torch.linspace(0.4, 1.1, 141), torch.linspace(0.5, 1.1, 121)):
        step, offset = float(wide) * width / 3, -low * float(shift)
        codes = ((weight[0, :16] + offset) / step).round().clamp(0, 3)
        least = min(least, float((codes * step - offset - weight[0, :16]).square().sum()))
    # The grid is fine, and what is stored has float16 units.
    assert found <= 1.01 * least


def test_important_columns_lose_less(kind: KQuant) -> None:
    weight = normal(8, 512, seed=7)
    importance = torch.ones(512)
    importance[::8] = 100.0
    plain, weighted = quantize(weight, kind).value(), quantize(weight, kind, importance).value()

    def error(value: torch.Tensor) -> float:
        return float(((value.reshape_as(weight) - weight).square() * importance).sum())

    assert error(weighted) < error(plain)


def test_columns_without_importance_are_still_rounded(kind: KQuant) -> None:
    weight = normal(2, 256, seed=8)
    importance = torch.zeros(256)
    assert relative_error(weight, quantize(weight, kind, importance).value()) < 0.2
    importance[:128] = 1.0
    assert relative_error(weight, quantize(weight, kind, importance).value()) < 0.4


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_constant_weights(kind: KQuant, value: float) -> None:
    weight = torch.full((2, 256), value)
    assert torch.allclose(quantize(weight, kind).value(), weight.reshape(-1, 256), rtol=2e-3)


def test_rows_do_not_depend_on_one_another(kind: KQuant) -> None:
    weight = normal(5, 256, seed=9)
    whole, last = quantize(weight, kind).value(), quantize(weight[4:], kind).value()
    assert torch.equal(whole[4:], last)
