"""Cosines and angles against vectors whose angle is known."""

import math

import pytest
import torch

from compress.core.errors import CalibrationError
from compress.numerics.similarity import Influence, angular_distance, cosines


def _turned(angle: float) -> torch.Tensor:
    return torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)


def test_a_cosine_is_that_of_the_angle_whatever_the_lengths() -> None:
    before = torch.stack([_turned(0.3), 5 * _turned(1.0)])
    after = torch.stack([7 * _turned(0.3 + 0.5), _turned(1.0 + 2.0)])
    expected = torch.tensor([math.cos(0.5), math.cos(2.0)], dtype=torch.float64)
    torch.testing.assert_close(cosines(before, after), expected)


def test_a_vector_of_zeros_is_similar_to_none() -> None:
    assert float(cosines(torch.zeros(3), torch.ones(3))) == 0


def test_vectors_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        cosines(torch.ones(2, 3), torch.ones(3))


def test_influence_is_one_minus_the_mean_over_all_tokens_whatever_the_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(5, 4, 8, generator=generator)
    after = before + torch.randn(5, 4, 8, generator=generator)
    influence = Influence()
    influence.add(before[:3], after[:3])
    influence.add(before[3:], after[3:])
    expected = 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
    assert influence.tokens == 20
    assert influence.value == pytest.approx(float(expected), rel=1e-5)


def test_a_block_that_only_lengthens_has_no_influence() -> None:
    influence = Influence()
    values = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    influence.add(values, 3 * values)
    assert influence.value == pytest.approx(0, abs=1e-12)


def test_angles_are_in_half_turns() -> None:
    before = torch.stack([_turned(0.0)] * 3)
    after = torch.stack([_turned(0.0), _turned(math.pi / 2), _turned(math.pi)])
    assert angular_distance(before, after) == pytest.approx(0.5)


def test_no_token_and_values_that_are_not_finite_are_errors() -> None:
    influence = Influence()
    with pytest.raises(CalibrationError, match="no calibration token"):
        _ = influence.value
    influence.add(torch.full((1, 2), float("nan")), torch.ones(1, 2))
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        _ = influence.value
    with pytest.raises(CalibrationError, match="no calibration token"):
        angular_distance(torch.zeros(0, 2), torch.zeros(0, 2))
