"""What is multiplied with what, whichever way it is written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from compress.models.products import Product, product


class Listener(TorchFunctionMode):
    """Notes every product."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Product] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = product(func, args, kwargs or {})
        if found is not None:
            self.heard.append(found)
        return func(*args, **(kwargs or {}))


EXPERTS = torch.rand(3, 5, 7)
"""Three experts: five by seven."""


@pytest.mark.parametrize(
    ("multiply", "columns", "dimension"),
    [
        (lambda x: torch.nn.functional.linear(x, EXPERTS[1]), 7, -1),
        (lambda x: torch.nn.functional.linear(x, weight=EXPERTS[1], bias=torch.rand(5)), 7, -1),
        (lambda x: torch.nn.functional.linear(x, EXPERTS[1].T), 5, -2),
        (lambda x: x @ EXPERTS[2], 5, -2),
        (lambda x: x @ EXPERTS[2].T, 7, -1),
        (lambda x: torch.matmul(x, EXPERTS[0]), 5, -2),
        (lambda x: x.mm(EXPERTS[0]), 5, -2),
    ],
)
def test_the_dimension_is_that_of_the_parameter(
    multiply: Callable[[torch.Tensor], torch.Tensor], columns: int, dimension: int
) -> None:
    rows = torch.rand(4, columns)
    with Listener() as listener:
        multiply(rows)
    (found,) = listener.heard
    assert found.rows is rows
    assert found.dimension_of(EXPERTS) == dimension


def test_other_functions_are_no_products() -> None:
    rows = torch.rand(2, 5)
    with Listener() as listener:
        torch.einsum("tc,ecr->etr", rows, EXPERTS)
        rows.expand(3, 2, 5) @ EXPERTS
        rows * EXPERTS[0, :, 0]
    assert listener.heard == []
