"""Whether what arrives before and after a change is the same, or the same multiplied."""

from collections.abc import Iterator, Mapping

import torch

from compress.models.responses import Seen

TOLERANCE = 1e-6
"""How exactly a factor must come out, relative to the largest value of its column. Some norms compute in
single precision whatever comes in."""


def multiples(before: torch.Tensor, after: torch.Tensor, factors: torch.Tensor) -> torch.Tensor | None:
    """Which factor each column was multiplied by.

    Args:
        before: ``[tokens, columns]``.
        after: the same afterwards.
        factors: all different.

    Returns:
        int64 ``[columns]``, -1 for a column that did not change; ``None`` where one changed in another way.
    """
    norms = before.square().sum(0)
    ratios = (before * after).sum(0) / norms.clamp_min(torch.finfo(torch.float64).tiny)
    order = factors.argsort()
    ranked = factors[order]
    right = torch.searchsorted(ranked, ratios).clamp(0, len(ranked) - 1)
    left = (right - 1).clamp_min(0)
    nearer = (ranked[left] - ratios).abs() < (ranked[right] - ratios).abs()
    found = order[torch.where(nearer, left, right)]
    size = TOLERANCE * before.abs().amax(0)
    still = ((after - before).abs() <= size).all(0)
    exact = ((after - before * factors[found]).abs() <= 2 * size).all(0)
    if not bool((still | exact).all()):
        return None
    return torch.where(still, -1, found)


def differ(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two results of the same shape are not the same; results of other shapes are not."""
    if left.shape != right.shape:
        return True
    if left.numel() == 0:
        return False
    size = torch.maximum(left.abs().amax(0), right.abs().amax(0))
    # Written so that NaN differs.
    return not bool(((left - right).abs() <= 2 * TOLERANCE * size).all())


def changed_elsewhere(before: Seen, after: Seen) -> str:
    """What changed that is no input of a linear layer; empty where nothing did."""
    for name, values in before.others.items():
        if any(differ(old, new) for old, new in paired({name: values}, after.others)):
            return f"{name}, which is no linear layer"
    if any(differ(old, new) for old, new in zip(before.outputs, after.outputs, strict=True)):
        return "what lies beyond its block"
    return ""


def paired(
    before: Mapping[str, list[torch.Tensor]], after: Mapping[str, list[torch.Tensor]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What met the same matrix before and after, one by one; what came no more is empty."""
    for name, values in before.items():
        others = after.get(name, [])
        yield from zip(values, others + [torch.zeros(0)] * (len(values) - len(others)), strict=False)


def by_sequence(rows: torch.Tensor, sequences: int) -> torch.Tensor:
    """``[sequences, tokens, columns]`` of what lies sequence after sequence."""
    return rows.reshape(sequences, -1, rows.shape[-1])
