"""Super-blocks of 256 weights whose blocks have quantized scales of their own: the k-quants of llama.cpp.

A weight is ``d * s * q`` or, in the kinds with minima, ``d * s * q - m * t``: ``q`` its code, ``s`` and ``t``
small integers of its block, ``d`` and ``m`` float16 numbers of the super-block. So scales cost few bits, and
blocks can be small (https://github.com/ggml-org/llama.cpp/pull/1684; the layout in bytes is in
`compress.formats.k_quants`).

The format leaves open how the numbers are found. Here, for least squared error:

1. each block by itself gets real numbers: ranges about its own are tried, and for the codes of each the best
   scale and minimum follow by least squares, from which come better codes (as ``make_qkx2_quants`` of ggml);
2. they are rounded to small integers by the super-block's ``d`` and ``m``;
3. the small integers of each block are tried one up and one down, and ``d`` and ``m`` are fitted again to all
   256 weights, as long as that helps. ggml stops after step 2.

Errors are measured with the numbers that are stored, so the result is never worse than step 2.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Final, Literal

import torch

from compress.numerics.grouping import row_chunks

SUPER_BLOCK: Final = 256
KQuant = Literal["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
_RANGES: Final = 21
_REFITS: Final = 2
"""Times that codes and numbers of a block are fitted to each other, for each range that is tried."""
_TURNS: Final = 3
"""Times that the small integers, and then ``d`` and ``m``, are fitted, at most."""
_CHUNK: Final = 1 << 19
"""Weights that are worked on together; the search holds about ten copies of them in float32."""


@dataclass(frozen=True)
class Kind:
    """One of the k-quants.

    Attributes:
        bits: of a code.
        block: weights that share ``s`` and ``t``; divides 256.
        lowest, highest: ``s``; it may be negative in the kinds without minima.
        minima: whether blocks have a ``t``, from 0 to ``highest``, and codes are not negative.
    """

    bits: int
    block: int
    lowest: int
    highest: int
    minima: bool

    @property
    def first(self) -> int:
        """The smallest code."""
        return 0 if self.minima else -(1 << (self.bits - 1))

    @property
    def last(self) -> int:
        """The largest code."""
        return self.first + (1 << self.bits) - 1


KINDS: Final[Mapping[KQuant, Kind]] = {
    "Q2_K": Kind(2, 16, 0, 15, minima=True),
    "Q3_K": Kind(3, 16, -32, 31, minima=False),
    "Q4_K": Kind(4, 32, 0, 63, minima=True),
    "Q5_K": Kind(5, 32, 0, 63, minima=True),
    "Q6_K": Kind(6, 16, -128, 127, minima=False),
}


@dataclass(frozen=True)
class SuperBlocks:
    """A matrix in super-blocks; ``n`` of them make ``rows * columns`` weights, row by row.

    Attributes:
        kind: which.
        codes: int8 ``[n, blocks, block]``.
        scales: ``s``, int16 ``[n, blocks]``.
        minima: ``t``, int16 ``[n, blocks]``, or ``None`` in the kinds without.
        scale: ``d``, float16 ``[n]``.
        minimum: ``m``, float16 ``[n]``, or ``None``.
    """

    kind: KQuant
    codes: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor | None
    scale: torch.Tensor
    minimum: torch.Tensor | None

    def value(self) -> torch.Tensor:
        """What a reader makes of them, float32 ``[n, 256]``, in the order of operations of llama.cpp."""
        steps = self.scale.float().unsqueeze(-1) * self.scales.float()
        value = steps.unsqueeze(-1) * self.codes.float()
        if self.minima is not None and self.minimum is not None:
            value = value - (self.minimum.float().unsqueeze(-1) * self.minima.float()).unsqueeze(-1)
        return value.flatten(1)


def quantize(weight: torch.Tensor, kind: KQuant, importance: torch.Tensor | None = None) -> SuperBlocks:
    """The super-blocks of a matrix with the least squared error that the search finds.

    Args:
        weight: floats ``[rows, columns]``, columns a multiple of 256; not changed.
        kind: which k-quant.
        importance: weight of the squared errors of each column, float32 ``[columns]``; all alike without.

    Returns:
        what is stored. Scales beyond float16 are infinite there; the caller refuses them.
    """
    kept = KINDS[kind]
    shape = (SUPER_BLOCK // kept.block, kept.block)
    parts = []
    for some in row_chunks(weight, _CHUNK):
        blocks = weight[some].float().reshape(-1, *shape)
        weights = torch.ones(1, *shape)
        if importance is not None:
            # Columns that nothing reaches still count a little: their weights are not left to chance.
            held = importance.float().clamp_min(float(importance.mean()) * 1e-6 or 1.0)
            weights = held.reshape(-1, *shape).repeat(blocks.shape[0] * SUPER_BLOCK // weight.shape[1], 1, 1)
        parts.append(_refined(blocks, weights, _begun(*_blocks(blocks, weights, kept), kept), kept))
    minima = [part.minima for part in parts if part.minima is not None]
    minimum = [part.minimum for part in parts if part.minimum is not None]
    steps = torch.cat([part.steps for part in parts])
    return SuperBlocks(
        kind,
        torch.cat([part.codes for part in parts]).to(torch.int8),
        steps.to(torch.int16),
        torch.cat(minima).to(torch.int16) if minima else None,
        torch.cat([part.scale for part in parts]),
        torch.cat(minimum) if minimum else None,
    )


@dataclass(frozen=True)
class _State:
    """Super-blocks under way, all in float32 but ``d`` and ``m``: as `SuperBlocks`, with ``s`` as steps."""

    codes: torch.Tensor
    steps: torch.Tensor
    minima: torch.Tensor | None
    scale: torch.Tensor
    minimum: torch.Tensor | None

    def error(self, blocks: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Squared errors of each block, ``[n, blocks]``."""
        slope, offset = self.numbers()
        return _error(blocks, weights, self.codes, slope, offset)

    def numbers(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and minimum of each block as a reader multiplies them, ``[n, blocks]``."""
        slope = self.scale.float().unsqueeze(-1) * self.steps
        if self.minima is None or self.minimum is None:
            return slope, None
        return slope, self.minimum.float().unsqueeze(-1) * self.minima


def _coded(
    blocks: torch.Tensor, slope: torch.Tensor, offset: torch.Tensor | None, kind: Kind
) -> torch.Tensor:
    """The nearest codes; 0 where a scale is 0."""
    inverse = torch.where(slope == 0, 0.0, 1 / slope).unsqueeze(-1)
    shifted = blocks if offset is None else blocks + offset.unsqueeze(-1)
    return (shifted * inverse).round_().clamp_(kind.first, kind.last)


def _error(
    blocks: torch.Tensor,
    weights: torch.Tensor,
    codes: torch.Tensor,
    slope: torch.Tensor,
    offset: torch.Tensor | None,
) -> torch.Tensor:
    wrong = codes * slope.unsqueeze(-1) - blocks
    if offset is not None:
        wrong = wrong - offset.unsqueeze(-1)
    return (wrong.square_() * weights).sum(-1)


def _fitted(
    blocks: torch.Tensor, weights: torch.Tensor, codes: torch.Tensor, kind: Kind
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scale, and the minimum, with the least squared error for given codes; of each block."""
    weighted = weights * codes
    squares, products = (weighted * codes).sum(-1), (weighted * blocks).sum(-1)
    alone = torch.where(squares > 0, products / squares, 0.0)
    if not kind.minima:
        return alone, None
    total = weights.sum(-1).expand_as(squares)
    first, level = weighted.sum(-1), (weights * blocks).sum(-1)
    determinant = total * squares - first.square()
    both = torch.where(determinant > 0, (total * products - first * level) / determinant, 0.0)
    offset = (both * first - level) / total
    # A scale or minimum below 0 cannot be stored: the best on the edge then, which is one of them at 0.
    fits = (determinant > 0) & (offset >= 0) & (both >= 0)
    edge = (first > 0) & (alone > 0)
    slope = torch.where(fits, both, torch.where(edge, alone, 0.0))
    return slope, torch.where(fits, offset, torch.where(edge, 0.0, (-level / total).clamp_min(0)))


def _ranges(blocks: torch.Tensor, kind: Kind) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Scales and minima to begin with: the extremes of a block on a code, or up to one beside it."""
    beside = torch.linspace(-0.9, 1, _RANGES).tolist()
    if kind.minima:
        low = blocks.amin(-1).clamp_max(0)
        width = blocks.amax(-1) - low
        yield from ((width / (kind.last + shift), -low) for shift in beside)
        return
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1)
    # There is one more code below zero than above, so it matters which side takes the largest weight.
    for shift in beside[::2]:
        yield largest / (kind.first - shift), None
        yield largest / (kind.last + shift), None


def _blocks(
    blocks: torch.Tensor, weights: torch.Tensor, kind: Kind
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Real scales and minima, each block by itself: step 1."""
    best: tuple[torch.Tensor, torch.Tensor | None] | None = None
    least = torch.empty(0)
    for slope, offset in _ranges(blocks, kind):
        for _ in range(_REFITS):
            slope, offset = _fitted(blocks, weights, _coded(blocks, slope, offset, kind), kind)
        error = _error(blocks, weights, _coded(blocks, slope, offset, kind), slope, offset)
        if best is None:
            best, least = (slope, offset), error
            continue
        better = error < least
        least = torch.where(better, error, least)
        old = best[1]
        kept = None if offset is None or old is None else torch.where(better, offset, old)
        best = torch.where(better, slope, best[0]), kept
    if best is None:
        raise ValueError("no range to begin with")
    return best


def _begun(slope: torch.Tensor, offset: torch.Tensor | None, kind: Kind) -> _State:
    """Numbers of blocks in small integers: step 2. Codes are not yet there."""
    if offset is None:
        largest = slope.gather(-1, slope.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scale = (largest / kind.lowest).to(torch.float16)
        return _State(slope, _steps(slope, scale, kind.lowest, kind.highest), None, scale, None)
    scale = (slope.amax(-1) / kind.highest).to(torch.float16)
    minimum = (offset.amax(-1) / kind.highest).to(torch.float16)
    steps, minima = _steps(slope, scale, 0, kind.highest), _steps(offset, minimum, 0, kind.highest)
    return _State(slope, steps, minima, scale, minimum)


def _steps(numbers: torch.Tensor, unit: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
    inverse = torch.where(unit == 0, 0.0, 1 / unit.float()).unsqueeze(-1)
    return (numbers * inverse).round_().clamp_(lowest, highest)


def _refined(blocks: torch.Tensor, weights: torch.Tensor, state: _State, kind: Kind) -> _State:
    """Small integers and their units in turns, as long as a super-block gains: step 3."""
    state = _stepped(blocks, weights, state, kind, (0,))
    error = state.error(blocks, weights).sum(-1)
    for _ in range(_TURNS):
        found = _stepped(blocks, weights, state, kind, (0, -1, 1))
        found = _refit(blocks, weights, found, kind)
        after = found.error(blocks, weights).sum(-1)
        better = after < error
        if not bool(better.any()):
            break
        state, error = _chosen(better, found, state), torch.where(better, after, error)
    return state


def _stepped(
    blocks: torch.Tensor, weights: torch.Tensor, state: _State, kind: Kind, moves: Sequence[int]
) -> _State:
    """The best of the small integers and their neighbours, of each block, with the codes for them."""
    best: _State | None = None
    least = torch.empty(0)
    for step, other in product(moves, moves if kind.minima else (0,)):
        steps = (state.steps + step).clamp_(kind.lowest, kind.highest)
        minima = None if state.minima is None else (state.minima + other).clamp_(0, kind.highest)
        tried = replace(state, steps=steps, minima=minima)
        tried = replace(tried, codes=_coded(blocks, *tried.numbers(), kind))
        error = tried.error(blocks, weights)
        if best is None:
            best, least = tried, error
            continue
        better = error < least
        best, least = _chosen(better, tried, best), torch.where(better, error, least)
    return state if best is None else best


def _chosen(better: torch.Tensor, new: _State, old: _State) -> _State:
    """The new state where it is better, by blocks ``[n, blocks]`` or by super-blocks ``[n]``."""
    by_block = better if better.dim() == 2 else better.unsqueeze(-1).expand_as(old.steps)
    chosen = replace(
        old,
        codes=torch.where(by_block.unsqueeze(-1), new.codes, old.codes),
        steps=torch.where(by_block, new.steps, old.steps),
        minima=_either(by_block, new.minima, old.minima),
    )
    if better.dim() == 2:
        # Blocks share the units of their super-block, which both states then have in common.
        return chosen
    return replace(
        chosen,
        scale=torch.where(better, new.scale, old.scale),
        minimum=_either(better, new.minimum, old.minimum),
    )


def _either(better: torch.Tensor, new: torch.Tensor | None, old: torch.Tensor | None) -> torch.Tensor | None:
    return None if new is None or old is None else torch.where(better, new, old)


def _refit(blocks: torch.Tensor, weights: torch.Tensor, state: _State, kind: Kind) -> _State:
    """``d`` and ``m`` with the least squared error over the super-block for what is there, and new codes."""
    basis = state.codes * state.steps.unsqueeze(-1)
    weighted = weights * basis
    squares, products = (weighted * basis).sum((-2, -1)), (weighted * blocks).sum((-2, -1))
    scale = torch.where(squares > 0, products / squares, state.scale.float())
    minimum = None
    if state.minima is not None and state.minimum is not None:
        # Least squares of d * (s q) - m * t: two unknowns.
        other = state.minima.unsqueeze(-1)
        cross = (weighted * other).sum((-2, -1))
        others = (weights * other.square()).expand_as(blocks).sum((-2, -1))
        level = (weights * other * blocks).sum((-2, -1))
        determinant = squares * others - cross.square()
        both = (products * others - cross * level) / determinant
        offset = (products * cross - squares * level) / determinant
        fits = (determinant > 0) & (both > 0) & (offset >= 0)
        scale = torch.where(fits, both, state.scale.float())
        minimum = torch.where(fits, offset, state.minimum.float()).to(torch.float16)
    found = replace(state, scale=scale.to(torch.float16), minimum=minimum)
    return replace(found, codes=_coded(blocks, *found.numbers(), kind))
