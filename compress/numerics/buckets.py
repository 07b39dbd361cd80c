"""A next-token distribution in few numbers: its most likely tokens, and all others as one outcome, the tail.

Putting outcomes together can only bring two distributions nearer (data processing; by the log sum inequality,
Cover and Thomas 2006, "Elements of Information Theory", theorem 2.7.1). So a divergence over the k tokens and
the tail is a lower bound of the divergence over the vocabulary, and the divergence itself where k is the
vocabulary.

Packed, a position takes 2 bytes for each log-probability, 2 or 3 for each token, and 2 for the tail: 258
bytes at k = 64 for a vocabulary of up to 65,536 tokens, and 322 for a larger one. Half precision rounds a
logarithm by at most one part in 2,048: a probability of 0.37 by 0.00018, any other one by less. What is
unpacked is scaled by a common factor so that it sums to one again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Final

import torch

_NUMBERS: Final = 2**23
"""Of a distribution that are worked on at once."""
_SHORT: Final = 2**16
"""The largest vocabulary whose tokens fit two bytes."""
MOST_TOKENS: Final = 2**24
"""The largest vocabulary whose tokens fit three bytes."""


@dataclass(frozen=True)
class Buckets:
    """The most likely tokens of a model at each position, and all others as one.

    Attributes:
        tokens: integers ``[positions, k]``.
        log_probabilities: float32 ``[positions, k]``, nats.
        tail: float32 ``[positions]``, logarithm of what all other tokens share; minus infinity for nothing.
        first: integers ``[positions]``, the most likely token.
        drawn: integers ``[positions, draws]``, tokens of the tail, drawn by their probabilities with
            replacement; any token where the tail is nothing. ``None`` where none were drawn.
        drawn_log_probabilities: float32 ``[positions, draws]``, theirs among all tokens, nats.
    """

    tokens: torch.Tensor
    log_probabilities: torch.Tensor
    tail: torch.Tensor
    first: torch.Tensor
    drawn: torch.Tensor | None = None
    drawn_log_probabilities: torch.Tensor | None = None

    @property
    def outcomes(self) -> torch.Tensor:
        """Log-probabilities of the tokens and, last, of the tail, ``[positions, k + 1]``."""
        return torch.cat([self.log_probabilities, self.tail[:, None]], dim=-1)

    def of(self, distribution: torch.Tensor) -> torch.Tensor:
        """Log-probabilities ``[positions, k + 1]`` of the same outcomes in another distribution.

        Args:
            distribution: log-probabilities ``[positions, vocabulary]``.
        """
        tokens = self.tokens.long()
        return torch.cat([distribution.gather(-1, tokens), tail(distribution, tokens)[:, None]], dim=-1)

    def rows(self, rows: slice | torch.Tensor) -> "Buckets":
        """Those of some positions."""
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> "Buckets":
        """The same on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Buckets":
        return Buckets(
            change(self.tokens),
            change(self.log_probabilities),
            change(self.tail),
            change(self.first),
            None if self.drawn is None else change(self.drawn),
            None if self.drawn_log_probabilities is None else change(self.drawn_log_probabilities),
        )


def buckets(
    logits: torch.Tensor, k: int, draws: int = 0, generator: torch.Generator | None = None
) -> Buckets:
    """The k most likely tokens of each position and the tail.

    Args:
        logits: ``[positions, vocabulary]``.
        k: at most the vocabulary.
        draws: how many tokens of the tail are drawn; 0 where there is none.
        generator: of the draws, on the device of the logits.
    """
    parts = [_buckets(part, k, draws, generator) for part in logits.split(rows_at_once(logits))]
    joined = {
        field.name: torch.cat([getattr(part, field.name) for part in parts])
        for field in fields(Buckets)
        if getattr(parts[0], field.name) is not None
    }
    return Buckets(**joined)


def rows_at_once(logits: torch.Tensor) -> int:
    """Positions of ``[positions, vocabulary]`` that are worked on at once."""
    return max(1, _NUMBERS // logits.shape[-1])


def tail(distribution: torch.Tensor, left_out: torch.Tensor) -> torch.Tensor:
    """Logarithm of the probability of all tokens but some: summed, since one minus the others cancels.

    Args:
        distribution: log-probabilities ``[positions, vocabulary]``.
        left_out: int64 ``[positions, k]``.

    Returns:
        ``[positions]``; minus infinity where no token remains.
    """
    return distribution.scatter(-1, left_out, -torch.inf).logsumexp(-1)


def packed_layout(k: int, draws: int, vocabulary: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype of each tensor of packed positions, and its shape for one position."""
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"tail": (torch.float16, ())}
    for name, count in (("", k), ("drawn_", draws)):
        if count:
            layout[f"{name}tokens"] = (torch.uint16, (count,))
            layout[f"{name}log_probabilities"] = (torch.float16, (count,))
            if vocabulary > _SHORT:
                layout[f"{name}high"] = (torch.uint8, (count,))
    return layout


def packed_bytes(k: int, draws: int, vocabulary: int) -> int:
    """Bytes of one packed position."""
    layout = packed_layout(k, draws, vocabulary)
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in layout.values())


def pack(found: Buckets, vocabulary: int) -> dict[str, torch.Tensor]:
    """Buckets in few bytes, on the host, as `packed_layout` says.

    Args:
        found: of any positions.
        vocabulary: tokens there are; at most `MOST_TOKENS`.
    """
    packed = {"tail": found.tail.to("cpu", torch.float16)}
    for name, tokens, logarithms in (
        ("", found.tokens, found.log_probabilities),
        ("drawn_", found.drawn, found.drawn_log_probabilities),
    ):
        if tokens is not None and logarithms is not None:
            numbers = tokens.to("cpu", torch.int32)
            packed[f"{name}tokens"] = (numbers & (_SHORT - 1)).to(torch.uint16)
            packed[f"{name}log_probabilities"] = logarithms.to("cpu", torch.float16)
            if vocabulary > _SHORT:
                packed[f"{name}high"] = (numbers >> 16).to(torch.uint8)
    return packed


def unpack(packed: Mapping[str, torch.Tensor]) -> Buckets:
    """What `pack` made of buckets, as distributions that sum to one."""
    kept, rest = packed["log_probabilities"].float(), packed["tail"].float()
    whole = torch.cat([kept, rest[:, None]], dim=-1).logsumexp(-1)
    tokens = _numbers(packed, "")
    drawn = "drawn_tokens" in packed
    return Buckets(
        tokens,
        kept - whole[:, None],
        rest - whole,
        tokens[:, 0],
        _numbers(packed, "drawn_") if drawn else None,
        packed["drawn_log_probabilities"].float() - whole[:, None] if drawn else None,
    )


def _numbers(packed: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    tokens = packed[f"{name}tokens"].to(torch.int32)
    high = packed.get(f"{name}high")
    return tokens if high is None else tokens + (high.to(torch.int32) << 16)


def _buckets(logits: torch.Tensor, k: int, draws: int, generator: torch.Generator | None) -> Buckets:
    distribution = logits.float().log_softmax(-1)
    found = distribution.topk(k, dim=-1)
    rest = distribution.scatter(-1, found.indices, -torch.inf)
    plain = Buckets(found.indices, found.values, rest.logsumexp(-1), logits.argmax(-1))
    if not draws:
        return plain
    below = rest.exp_().cumsum(-1)
    whole = below[:, -1:].contiguous()
    places = torch.rand(len(logits), draws, device=logits.device, generator=generator) * whole
    # The last token that can be drawn, in case that rounding leads beyond it.
    last = torch.searchsorted(below, whole)
    drawn = torch.minimum(torch.searchsorted(below, places, right=True), last)
    return replace(plain, drawn=drawn, drawn_log_probabilities=distribution.gather(-1, drawn))
