"""The smallest magnitudes of several matrices against a sort of all of them."""

import math
from collections.abc import Iterator

import pytest
import torch

from compress.core.errors import ModelError
from compress.numerics.magnitudes import smallest_magnitudes

SHAPES = ((7, 12), (1, 5), (30, 40), (3, 3))


def _matrices(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(*shape, generator=generator) * scale).to(dtype)
        for shape, scale in zip(SHAPES, (1.0, 0.1, 0.5, 3.0), strict=True)
    ]


def _sorted(matrices: list[torch.Tensor], gone: int) -> list[int]:
    """The same from one sort, stable, so that ties go to the earlier matrix."""
    flat = torch.cat([matrix.float().abs().flatten() for matrix in matrices])
    owner = torch.cat([torch.full((matrix.numel(),), index) for index, matrix in enumerate(matrices)])
    lowest = torch.sort(flat, stable=True).indices[:gone]
    return torch.bincount(owner[lowest], minlength=len(matrices)).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gone", [0, 1, 2, 100, 647, 1000, 1297, 1298])
def test_they_are_those_of_a_sort(dtype: torch.dtype, gone: int) -> None:
    matrices = _matrices(dtype)
    assert sum(matrix.numel() for matrix in matrices) == 1298
    assert smallest_magnitudes(lambda: matrices, gone) == _sorted(matrices, gone)


def test_values_that_share_their_upper_half_are_told_apart() -> None:
    generator = torch.Generator().manual_seed(1)
    close = [1 + torch.rand(20, 20, generator=generator) * 1e-3 for _ in range(3)]
    for gone in (1, 250, 600, 1199):
        assert smallest_magnitudes(lambda: close, gone) == _sorted(close, gone)


def test_ties_count_for_the_earlier_matrix() -> None:
    same = [torch.full((2, 3), -1.0), torch.ones(4, 1), torch.zeros(1, 2)]
    assert smallest_magnitudes(lambda: same, 2) == [0, 0, 2]
    assert smallest_magnitudes(lambda: same, 5) == [3, 0, 2]
    assert smallest_magnitudes(lambda: same, 10) == [6, 2, 2]


def test_matrices_are_brought_one_by_one_and_twice() -> None:
    matrices = _matrices()
    brought: list[int] = []

    def bring() -> Iterator[torch.Tensor]:
        for index, matrix in enumerate(matrices):
            brought.append(index)
            # As GPT-2's lie in their parameters.
            yield matrix.T.contiguous().T

    assert smallest_magnitudes(bring, 500) == _sorted(matrices, 500)
    assert brought == [0, 1, 2, 3] * 2


def test_what_cannot_be_counted_is_an_error() -> None:
    matrices = _matrices()
    for gone in (-1, 1299):
        with pytest.raises(ValueError, match=f"{gone} of 1298 weights"):
            smallest_magnitudes(lambda: matrices, gone)
    matrices[2][3, 3] = math.nan
    with pytest.raises(ModelError, match="NaN or infinite"):
        smallest_magnitudes(lambda: matrices, 10)
