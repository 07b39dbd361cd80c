"""Which share of its weights each layer loses, when some layers can spare more than others.

Layers with many outliers, weights whose magnitude times input is many times the mean of their layer, lose
fewer weights than others (Yin et al. 2023, "Outlier Weighed Layerwise Sparsity", OWL, arXiv 2310.05175,
equations 1 to 3). The mean share over all weights is the one that was asked for.
"""

from collections.abc import Sequence

import torch

from compress.numerics.grouping import row_chunks


def outlier_share(matrices: Sequence[tuple[torch.Tensor, torch.Tensor]], factor: float) -> float:
    """The share of outliers among the weights of a layer.

    Args:
        matrices: the layer's weights ``[rows, columns]``, each with the norms of the inputs that its columns
            multiply, ``[columns]``.
        factor: a weight is an outlier when its magnitude times input is larger than so many means of the
            layer.

    Returns:
        from 0 to 1; 0 for a layer whose scores are all zero.

    Raises:
        ValueError: there is no weight.
    """
    count = sum(weight.numel() for weight, _ in matrices)
    if count == 0:
        raise ValueError("a layer without weights has no outliers")
    total = sum(
        float(_scores(weight[rows], norms).sum(dtype=torch.float64))
        for weight, norms in matrices
        for rows in row_chunks(weight)
    )
    bound = factor * total / count
    above = sum(
        int((_scores(weight[rows], norms) > bound).sum())
        for weight, norms in matrices
        for rows in row_chunks(weight)
    )
    return above / count


def _scores(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    return weight.float().abs() * norms


def shares_by_outliers(
    outliers: Sequence[float], weights: Sequence[int], sparsity: float, spread: float
) -> list[float]:
    """The share of weights that each layer loses: the fewer, the more outliers it has.

    As in the authors' code, shares fall linearly with the outliers, the largest and the smallest lie twice
    the spread apart, and their mean is the sparsity. Here the mean is one over weights, for layers of
    different size. Where a layer would get further than half-way to losing nothing or everything, all
    distances from the mean shrink alike until none does.

    Args:
        outliers: of each layer, `outlier_share`.
        weights: of each layer, how many there are.
        sparsity: mean share, between 0 and 1.
        spread: half the distance of the largest and the smallest share.
    """
    low, high = min(outliers), max(outliers)
    if high == low:
        return [sparsity] * len(outliers)
    kept = [2 * spread * (outlier - low) / (high - low) for outlier in outliers]
    mean = sum(share * count for share, count in zip(kept, weights, strict=True)) / sum(weights)
    most, least = max(kept) - mean, mean - min(kept)
    shrink = min(1.0, reach(sparsity, most) / most, reach(1 - sparsity, least) / least)
    return [sparsity - shrink * (share - mean) for share in kept]


def reach(room: float, spread: float) -> float:
    """How far a share may move into a room without getting further than half-way through it."""
    return min(spread, room / 2)


def shares_around(sparsity: float, spread: float, steps: int, grid: int) -> tuple[int, ...]:
    """Shares to choose among, evenly on both sides of a sparsity, which is one of them.

    Args:
        sparsity: between 0 and 1.
        spread: the largest distance from it, which ends half-way to 0 and to 1.
        steps: shares on each side.
        grid: parts of a whole in which shares are counted.

    Returns:
        whole numbers of such parts, rising.
    """
    furthest = reach(min(sparsity, 1 - sparsity), spread)
    return tuple(
        sorted({round((sparsity + furthest * step / steps) * grid) for step in range(-steps, steps + 1)})
    )
