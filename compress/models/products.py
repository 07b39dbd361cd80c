"""Products with matrices, as a function mode is told of them: what multiplies what, however it is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

_TIMES = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)


@dataclass(frozen=True, eq=False)
class Product:
    """Rows times a matrix.

    Attributes:
        rows: ``[..., columns]``.
        matrix: a parameter, or a view into one.
        dimension: of the matrix, that is summed over.
    """

    rows: torch.Tensor
    matrix: torch.Tensor
    dimension: int

    def dimension_of(self, parameter: torch.Tensor) -> int | None:
        """Which dimension of the whole parameter is summed over, counted from its end.

        Args:
            parameter: that the matrix is, or is a view into.
        """
        size, stride = self.matrix.shape[self.dimension], self.matrix.stride(self.dimension)
        return next(
            (
                place
                for place in range(-1, -parameter.dim() - 1, -1)
                if (parameter.shape[place], parameter.stride(place)) == (size, stride)
            ),
            None,
        )


def product(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | None:
    """What a function multiplies; ``None`` where it is no product of rows and one matrix.

    Args:
        func: as a `torch.overrides.TorchFunctionMode` is told of it.
    """
    if func is functional.linear and args:
        return Product(args[0], args[1] if len(args) > 1 else kwargs["weight"], -1)
    if func in _TIMES and len(args) == 2 and args[1].dim() == 2:
        return Product(args[0], args[1], -2)
    return None
