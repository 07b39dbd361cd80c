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

from collections.abc import Mapping
from dataclasses import dataclass
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
    """

    tokens: torch.Tensor
    log_probabilities: torch.Tensor
    tail: torch.Tensor
    first: torch.Tensor

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

    def rows(self, rows: slice) -> "Buckets":
        """Those of some positions."""
        return Buckets(self.tokens[rows], self.log_probabilities[rows], self.tail[rows], self.first[rows])

    def to(self, device: torch.device) -> "Buckets":
        """The same on a device."""
        return Buckets(
            self.tokens.to(device),
            self.log_probabilities.to(device),
            self.tail.to(device),
            self.first.to(device),
        )


def buckets(logits: torch.Tensor, k: int) -> Buckets:
    """The k most likely tokens of each position and the tail.

    Args:
        logits: ``[positions, vocabulary]``.
        k: at most the vocabulary.
    """
    parts = [_buckets(part, k) for part in logits.split(rows_at_once(logits))]
    return Buckets(
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.log_probabilities for part in parts]),
        torch.cat([part.tail for part in parts]),
        torch.cat([part.first for part in parts]),
    )


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


def packed_bytes(k: int, vocabulary: int) -> int:
    """Bytes of one packed position."""
    return k * (2 + (2 if vocabulary <= _SHORT else 3)) + 2


def packed_layout(k: int, vocabulary: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype of each tensor of packed positions, and its shape for one position."""
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "tokens": (torch.uint16, (k,)),
        "log_probabilities": (torch.float16, (k,)),
        "tail": (torch.float16, ()),
    }
    return layout if vocabulary <= _SHORT else {**layout, "high": (torch.uint8, (k,))}


def pack(found: Buckets, vocabulary: int) -> dict[str, torch.Tensor]:
    """Buckets in few bytes, on the host.

    Args:
        found: of any positions.
        vocabulary: tokens there are; at most `MOST_TOKENS`.
    """
    tokens = found.tokens.to("cpu", torch.int32)
    packed = {
        "tokens": (tokens & (_SHORT - 1)).to(torch.uint16),
        "log_probabilities": found.log_probabilities.to("cpu", torch.float16),
        "tail": found.tail.to("cpu", torch.float16),
    }
    return packed if vocabulary <= _SHORT else {**packed, "high": (tokens >> 16).to(torch.uint8)}


def unpack(packed: Mapping[str, torch.Tensor]) -> Buckets:
    """What `pack` made of buckets, as distributions that sum to one."""
    tokens = packed["tokens"].to(torch.int32)
    if "high" in packed:
        tokens += packed["high"].to(torch.int32) << 16
    kept, rest = packed["log_probabilities"].float(), packed["tail"].float()
    whole = torch.cat([kept, rest[:, None]], dim=-1).logsumexp(-1)
    return Buckets(tokens, kept - whole[:, None], rest - whole, tokens[:, 0])


def _buckets(logits: torch.Tensor, k: int) -> Buckets:
    distribution = logits.float().log_softmax(-1)
    found = distribution.topk(k, dim=-1)
    return Buckets(found.indices, found.values, tail(distribution, found.indices), logits.argmax(-1))
