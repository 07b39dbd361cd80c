"""Names and shapes of what bitsandbytes stores; tests/quantize hold the bytes against transformers' own."""

import pytest
import torch

from compress.core.errors import ModelError
from compress.formats.bitsandbytes import BLOCK, dequantized, encoded_bytes, round_int8, round_nf4


def weight(rows: int = 24, columns: int = 128) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def test_nf4_takes_the_nearest_of_its_levels() -> None:
    """From section 3 of the paper: the sixteen levels, scaled by the largest magnitude of 64 numbers."""
    made = round_nf4(weight(), double=False)
    levels = made.tensors["weight.quant_map"]
    blocks = weight().float().reshape(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    assert torch.equal(made.tensors["weight.absmax"], largest[:, 0])
    nearest = levels[(blocks / largest).unsqueeze(-1).sub(levels).abs().argmin(-1)] * largest
    assert torch.equal(made.value, nearest.reshape(weight().shape).to(torch.bfloat16))


def test_rounding_the_magnitudes_costs_little() -> None:
    plain, double = round_nf4(weight(), double=False), round_nf4(weight(), double=True)
    assert double.tensors["weight.absmax"].dtype == torch.uint8
    difference = (plain.value - double.value).float().norm() / plain.value.float().norm()
    assert 0 < difference < 0.02


def test_int8_rounds_each_row_by_its_largest() -> None:
    made = round_int8(weight())
    largest = weight().half().float().abs().amax(1)
    assert torch.equal(made.tensors["SCB"], largest)
    steps = weight().float() / largest[:, None] * 127
    assert (made.tensors["weight"].float() - steps).abs().max() <= 0.5 + 1e-3
    expected = (made.tensors["weight"].float() * (largest[:, None] / 127)).to(torch.bfloat16)
    assert torch.equal(made.value, expected)


@pytest.mark.parametrize("double", [True, False])
def test_the_plan_knows_the_bytes(double: bool) -> None:
    for rows, columns in ((24, 128), (256, 512)):
        for kind, made in (
            ("nf4", round_nf4(weight(rows, columns), double=double)),
            ("int8", round_int8(weight(rows, columns))),
        ):
            real = sum(tensor.numel() * tensor.element_size() for tensor in made.tensors.values())
            predicted = encoded_bytes(kind, rows, columns, double=double)  # type: ignore[arg-type]
            assert predicted == pytest.approx(real, abs=64)


def test_names_hang_on_the_weight() -> None:
    made = round_int8(weight())
    assert set(made.named("a.b.weight")) == {"a.b.weight", "a.b.SCB", "a.b.weight_format"}
    with pytest.raises(ModelError, match="does not end in"):
        made.named("a.b.kernel")


def test_other_layers_are_not_its_own() -> None:
    assert dequantized(torch.nn.Linear(2, 2), torch.float32) is None
