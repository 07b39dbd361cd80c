"""Linear layers on aten's packed integer kernels, and which matrices those take.

Found by running them (torch 2.13) and held by the tests:

- Both compute in bfloat16 here, whatever the rest of the model computes in. Float32 and float16 run as well
  on the CPU, by plain loops that took 20 to 150 times as long as bfloat16; CUDA takes bfloat16 alone.
- ``_weight_int4pack_mm``: a value is ``(n - 8) * scale + zero`` with n in 0..15, so integers of 2, 3 and 4
  bits fit, and a zero point goes into the additive zero. Groups of 32, 64, 128 or 256 inputs; a longer
  group repeats its scale. On the CPU outputs come in sixteens; rows are padded here.
- ``_weight_int8pack_mm``: one scale an output. The CPU kernel uses aligned loads along the inputs: with
  inputs that are no multiple of 16 it crashes or returns garbage, so such layers stay dense, and operands
  that do not start at a multiple of 64 bytes (a view, a file mapped into memory) are copied.
"""

from abc import ABC, abstractmethod
from typing import Any, Final, final

import torch
from torch import nn

from compress.core.errors import EnvironmentFault
from compress.numerics.affine import Quantized

KERNEL_GROUPS: Final = (256, 128, 64, 32)
KERNEL_DTYPE: Final = torch.bfloat16
_TOLERANCE: Final = 2e-2
_INT4_ROWS: Final = 16
_INT8_COLUMNS: Final = 16
_CUDA_TILE: Final = 16
_ALIGNMENT: Final = 64


class PackedLinear(nn.Module, ABC):
    """A linear layer whose weight stays packed in memory.

    Args:
        rows: outputs.
        bias: of the layer, or none.
    """

    kernel: str

    def __init__(self, rows: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.rows = rows
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @abstractmethod
    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """``[tokens, inputs]`` times the transposed matrix: ``[tokens, rows]``."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``[..., inputs]`` to ``[..., rows]``, in the dtype of the inputs."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        outputs = self.product(flat).to(inputs.dtype).reshape(*inputs.shape[:-1], self.rows)
        return outputs if self.bias is None else outputs + self.bias


@final
class Int4Linear(PackedLinear):
    """``aten._weight_int4pack_mm`` and its form for the CPU."""

    kernel = "int4"

    def __init__(self, matrix: Quantized, bias: torch.Tensor | None, device: torch.device) -> None:
        super().__init__(matrix.shape[0], bias)
        self.group = kernel_group(matrix)
        self.on_cuda = device.type == "cuda"
        scale = matrix.scale.to(device=device, dtype=torch.float32)
        additive = torch.zeros_like(scale)
        if matrix.zero is not None:
            additive = -matrix.zero.to(device=device, dtype=torch.float32) * scale
        repeats = matrix.columns // matrix.groups // self.group
        pairs = torch.stack([scale, additive], dim=-1).repeat_interleave(repeats, dim=1)
        levels = matrix.q.to(device=device, dtype=torch.int32) + 8
        padding = -matrix.shape[0] % _INT4_ROWS
        if padding:
            levels = nn.functional.pad(levels, (0, 0, 0, padding), value=8)
            pairs = nn.functional.pad(pairs, (0, 0, 0, 0, 0, padding))
        packed: torch.Tensor
        if self.on_cuda:
            tiles = next(tile for tile in (8, 4, 2) if matrix.columns % (tile * _CUDA_TILE) == 0)
            bytes_ = (levels[:, ::2] << 4 | levels[:, 1::2]).to(torch.uint8)
            packed = torch.ops.aten._convert_weight_to_int4pack(bytes_, tiles)
        else:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
        self.packed = nn.Buffer(packed)
        self.scales_and_zeros = nn.Buffer(pairs.transpose(0, 1).contiguous().to(KERNEL_DTYPE))

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """See `PackedLinear.product`."""
        operator: Any = (
            torch.ops.aten._weight_int4pack_mm if self.on_cuda else torch.ops.aten._weight_int4pack_mm_for_cpu
        )
        rows: torch.Tensor = operator(
            _aligned(inputs.to(KERNEL_DTYPE)), self.packed, self.group, self.scales_and_zeros
        )
        return rows[:, : self.rows]


@final
class Int8Linear(PackedLinear):
    """``aten._weight_int8pack_mm``; a zero point is taken out by the sum of the inputs."""

    kernel = "int8"

    def __init__(self, matrix: Quantized, bias: torch.Tensor | None, device: torch.device) -> None:
        super().__init__(matrix.shape[0], bias)
        self.packed = nn.Buffer(_aligned(matrix.q.to(device)))
        scale = matrix.scale.flatten().to(device=device, dtype=torch.float32)
        self.scale = nn.Buffer(scale.to(KERNEL_DTYPE))
        offset = None
        if matrix.zero is not None:
            offset = (matrix.zero.flatten().to(device).float() * scale).to(KERNEL_DTYPE)
        self.offset: torch.Tensor | None
        self.register_buffer("offset", offset)

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """See `PackedLinear.product`."""
        outputs: torch.Tensor = torch.ops.aten._weight_int8pack_mm(
            _aligned(inputs.to(KERNEL_DTYPE)), self.packed, self.scale
        )
        if self.offset is None:
            return outputs
        return outputs - inputs.to(KERNEL_DTYPE).sum(-1, keepdim=True) * self.offset


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous and starting where torch's own allocations do."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def kernel_group(matrix: Quantized) -> int:
    """The kernel's group for a matrix: the largest that divides the matrix's own; 0 where none does."""
    own = matrix.columns // matrix.groups
    return next((group for group in KERNEL_GROUPS if own % group == 0), 0)


def obstacle(matrix: Quantized, device: torch.device) -> str | None:
    """Why no kernel takes a matrix, or ``None`` where one does."""
    bits, own = matrix.scheme.bits, matrix.columns // matrix.groups
    operator = "aten::_weight_int4pack_mm" if bits <= 4 else "aten::_weight_int8pack_mm"
    if bits <= 4 and device.type == "cpu":
        operator += "_for_cpu"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(operator, device.type.upper()):
        return f"this torch has no {operator} for {device.type}"
    if bits <= 4:
        if kernel_group(matrix) == 0:
            return f"groups of {own} inputs; the int4 kernel takes multiples of 32"
        return None
    if matrix.groups != 1:
        return f"{bits} bits with {matrix.groups} groups a row; the int8 kernel takes one scale a row"
    if matrix.columns % _INT8_COLUMNS:
        return f"{matrix.columns} inputs; the int8 kernel takes multiples of {_INT8_COLUMNS}"
    return None


def pack(
    matrix: Quantized, bias: torch.Tensor | None, device: torch.device, dtype: torch.dtype
) -> PackedLinear:
    """The layer on its kernel, for a matrix without an `obstacle`."""
    kind = Int4Linear if matrix.scheme.bits <= 4 else Int8Linear
    return kind(matrix, None if bias is None else bias.to(device=device, dtype=dtype), device)


def check_product(layer: PackedLinear, matrix: Quantized, device: torch.device) -> None:
    """Compare a packed layer with the dense product of its first rows, on random inputs.

    Raises:
        EnvironmentFault: the kernel of this machine computes something else.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, matrix.columns, generator=generator).to(device=device, dtype=KERNEL_DTYPE)
    rows = matrix.rows(0, min(matrix.shape[0], 32))
    # In double precision: a dense model rounds its dequantized weights to their storage dtype, a kernel
    # that multiplies integers does not.
    exact = Quantized(rows.q, rows.scale.double(), rows.zero, rows.scheme)
    dense = exact.dequantize().to(device)
    expected = inputs.double() @ dense.T
    got = layer.product(inputs)[:, : dense.shape[0]].double()
    error = float((got - expected).norm() / expected.norm().clamp_min(1e-30))
    if not error <= _TOLERANCE:
        raise EnvironmentFault(
            f"torch's {layer.kernel} kernel differs from the dense product by {error:.2e} on {matrix.scheme}",
            "measure without torch-int4 on this machine",
        )
