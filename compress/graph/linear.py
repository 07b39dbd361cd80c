"""Linear layers that become ``MatMulNBits`` in a traced graph."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import nn

from compress.formats.matmul_nbits import DOMAIN, OPERATOR, Packed, pack
from compress.numerics.affine import Quantized


@final
class GraphLinear(nn.Module):
    """A linear layer that can be traced and not computed: torch does not know the operator.

    Args:
        packed: the operands.
        bias: of the layer, or none.
        accuracy_level: the operator's attribute.
    """

    def __init__(self, packed: Packed, bias: torch.Tensor | None, accuracy_level: int) -> None:
        super().__init__()
        self.rows = packed.rows
        self.attributes: dict[str, Any] = {**packed.attributes, "accuracy_level": accuracy_level}
        self.integers = nn.Buffer(packed.integers)
        self.scales = nn.Buffer(packed.scales)
        self.zeros: torch.Tensor | None
        self.register_buffer("zeros", packed.zeros)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``[..., columns]`` to ``[..., rows]``, in the dtype of the inputs."""
        operands = [inputs, self.integers, self.scales]
        if self.zeros is not None:
            operands.append(self.zeros)
        outputs: torch.Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OPERATOR}",
            operands,
            attrs=self.attributes,
            dtype=inputs.dtype,
            shape=(*inputs.shape[:-1], self.rows),
            version=1,
        )
        return outputs if self.bias is None else outputs + self.bias


def replace(model: Any, matrices: Mapping[str, Quantized], dtype: torch.dtype, accuracy_level: int) -> None:
    """Put the operator in the place of dense linear layers.

    Args:
        model: whose layers are replaced, in place.
        matrices: the integers of each layer, by module.
        dtype: of the floats in the graph.
        accuracy_level: see `GraphLinear`.

    Raises:
        ModelError: a scale does not survive the cast to ``dtype``.
    """
    for name, matrix in matrices.items():
        bias = model.get_submodule(name).bias
        model.set_submodule(name, GraphLinear(pack(matrix, dtype), bias, accuracy_level))
