"""Principal components: what is kept, what a norm makes of it, and the room for a mean that is gone."""

import pytest
import torch

from compress.numerics.principal import principal


def vectors(count: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + 0.5


def test_the_span_is_that_of_the_largest_components() -> None:
    rows = vectors(200, 12)
    basis = principal(rows.T @ rows, 5)
    torch.testing.assert_close(basis.matrix.T @ basis.matrix, torch.eye(5, dtype=torch.float64))
    # Singular vectors of the rows themselves.
    _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close(basis.projection, right[:5].T @ right[:5])
    assert basis.carried == pytest.approx(float(sizes[:5].square().sum() / sizes.square().sum()))
    torch.testing.assert_close(basis.into @ basis.back, basis.projection)


@pytest.mark.parametrize("added", [0.0, 1e-2])
def test_a_narrow_rms_norm_finds_what_the_wide_one_does(added: float) -> None:
    rows = vectors(50, 16)
    basis = principal(rows.T @ rows, 8)
    inside = rows @ basis.projection * torch.logspace(-3, 2, 50, dtype=torch.float64).unsqueeze(1)

    def norm(values: torch.Tensor) -> torch.Tensor:
        return values / (values.square().mean(1, keepdim=True) + added).sqrt()

    torch.testing.assert_close(norm(inside @ basis.into), norm(inside) @ basis.into)
    torch.testing.assert_close(norm(inside @ basis.into) @ basis.back, norm(inside))


@pytest.mark.parametrize("kept", [2, 7, 11])
def test_a_narrow_layer_norm_finds_what_the_wide_one_does(kept: int) -> None:
    rows = vectors(50, 16)
    centred = rows - rows.mean(1, keepdim=True)
    basis = principal(rows.T @ rows, kept, without_mean=True)
    narrow = rows @ basis.into
    # The mean of the wide vector goes, and the narrow one has none.
    torch.testing.assert_close(narrow, centred @ basis.into)
    torch.testing.assert_close(narrow.mean(1), torch.zeros(50, dtype=torch.float64))
    _, _, right = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(basis.projection, right[: kept - 1].T @ right[: kept - 1])
    inside = centred @ basis.projection

    def norm(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(values, values.shape[-1:], eps=1e-2)

    torch.testing.assert_close(norm(inside @ basis.into) @ basis.back, norm(inside))


def test_all_channels_carry_all_and_no_channel_sticks_out() -> None:
    rows = vectors(100, 16) * torch.tensor([100.0, *[1.0] * 15]).double()
    whole = principal(rows.T @ rows, 16)
    assert whole.carried == pytest.approx(1.0)
    assert whole.scale == 1.0
    sizes = (rows @ whole.into).square().mean(0)
    assert float(sizes.max() / sizes.min()) < 3


@pytest.mark.parametrize(("kept", "without_mean"), [(0, False), (1, True), (17, False)])
def test_impossible_numbers_are_refused(kept: int, without_mean: bool) -> None:
    with pytest.raises(ValueError, match="cannot be kept"):
        principal(torch.eye(16), kept, without_mean=without_mean)
