"""Rotations are orthogonal, even, and keep the mean where they say so."""

import pytest
import scipy.linalg
import torch

from compress.numerics.rotation import hadamard, rotation


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 60, 76, 128, 768, 896])
def test_hadamard_matrices_hold_signs_with_orthogonal_rows(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))
    assert torch.equal(matrix[:, 0], torch.ones(order, dtype=torch.float64))


def test_a_power_of_two_is_sylvesters() -> None:
    assert torch.equal(hadamard(16), torch.from_numpy(scipy.linalg.hadamard(16)).double())


@pytest.mark.parametrize("order", [3, 6, 7, 50, 92])
def test_orders_without_a_known_matrix_have_none(order: int) -> None:
    assert hadamard(order) is None


@pytest.mark.parametrize("order", [1, 7, 12, 56, 64, 92, 896])
@pytest.mark.parametrize("keeps_mean", [False, True])
def test_rotations_are_orthogonal_and_mix_all_channels(order: int, keeps_mean: bool) -> None:
    matrix = rotation(order, 3, keeps_mean=keeps_mean)
    unit = torch.eye(order, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, unit, rtol=0, atol=1e-10)
    if keeps_mean:
        ones = torch.ones(order, dtype=torch.float64)
        torch.testing.assert_close(ones @ matrix, ones, rtol=0, atol=1e-10)
        torch.testing.assert_close(matrix @ ones, ones, rtol=0, atol=1e-10)
    if order >= 56:
        # An outlier in one channel is spread: no weight is much larger than the even one.
        assert float(matrix.abs().max()) * order**0.5 < 6
    assert torch.equal(matrix, rotation(order, 3, keeps_mean=keeps_mean))
    if order > 4:
        assert not torch.equal(matrix, rotation(order, 4, keeps_mean=keeps_mean))
