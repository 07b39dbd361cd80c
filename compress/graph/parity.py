"""Whether a graph computes what its model computes: the gate inside an export.

What torch says is taken down before the export, in float32 and *without* a cache: one forward pass over all
tokens of a sequence. The graph reads the same sequence in pieces, through its cache. So a cache that is off
by one, positions that count padding, a mask that was lost or a weight that was altered all show.

Errors are the largest absolute difference of the outputs over a case, relative to the largest absolute
output of torch in it. Positions that the mask hides are not compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.nn.functional import log_softmax, pad
from transformers.cache_utils import DynamicCache

from compress.core.errors import VerificationError
from compress.graph.running import Graph
from compress.graph.tracing import pad_token, positions, takes, takes_segments
from compress.models.tasks import Task

GREEDY_TOKENS: Final = 64
_LONG: Final = 40
_PROMPT: Final = 5


@dataclass(frozen=True)
class Bounds:
    """What is asked of a graph.

    Attributes:
        error: largest relative error of an output (see this module).
        divergence: largest mean Kullback-Leibler divergence of the next token, in nats; none is not asked.
        agreement: least share of positions whose likeliest token is torch's; none is not asked.
    """

    error: float
    divergence: float | None = None
    agreement: float | None = None


FLOAT32: Final = Bounds(error=1e-4)
FLOAT16: Final = Bounds(error=2e-2)
INTEGER: Final = Bounds(error=1e-3)
"""Integers multiplied exactly (accuracy level 0), against their own dequantized weights."""
INT8_ACTIVATIONS: Final = Bounds(error=0.1, divergence=0.02, agreement=0.9)
"""Accuracy level 4 rounds the inputs of every product to 8 bits, a scale a block: no small bound holds for
single outputs, so the next token's distribution is bounded as well."""


@dataclass(frozen=True)
class Case:
    """One batch of sequences, the pieces in which it is read, and what torch says of it.

    Attributes:
        name: what is tried.
        tokens: int64 ``[batch, length]``.
        mask: int64 ``[batch, length]``.
        pieces: how many tokens are read at once, in order; their sum is the length.
        expected: torch's outputs in float32, ``[batch, length, ...]``, or ``[batch, ...]`` of a classifier.
        segments: token types, or none.
        greedy: whether each token of a single piece is torch's likeliest.
    """

    name: str
    tokens: torch.Tensor
    mask: torch.Tensor
    pieces: tuple[int, ...]
    expected: torch.Tensor
    segments: torch.Tensor | None = None
    greedy: bool = False


@dataclass
class Parity:
    """What was measured of a graph.

    Attributes:
        errors: by case, the largest relative error.
        divergence: mean over all compared positions, nats.
        agreement: share of compared positions with torch's likeliest token.
        tokens: greedy tokens that were compared.
        near_ties: how many of them differ from torch's where its top two are nearer than the tolerance.
        flips: how many differ elsewhere.
    """

    errors: dict[str, float] = field(default_factory=dict)
    divergence: float | None = None
    agreement: float | None = None
    tokens: int = 0
    near_ties: int = 0
    flips: int = 0

    @property
    def error(self) -> float:
        """The largest error of all cases; not a number where one is."""
        values = torch.tensor(list(self.errors.values()))
        return float(values.max())

    def document(self, bounds: Bounds) -> dict[str, Any]:
        """For the lineage: what was measured beside what was asked, to three digits."""
        rounded = {name: float(f"{error:.3g}") for name, error in self.errors.items()}
        document: dict[str, Any] = {
            "bound": bounds.error,
            "error": float(f"{self.error:.3g}"),
            "cases": rounded,
        }
        for name, bound in (("divergence", bounds.divergence), ("agreement", bounds.agreement)):
            value = getattr(self, name)
            if value is not None:
                document[name] = float(f"{value:.3g}")
            if bound is not None:
                document[f"{name}_bound"] = bound
        if self.tokens:
            differing = {"near_ties": self.near_ties, "other_flips": self.flips}
            document |= {"greedy_tokens": self.tokens, **differing}
        return document


def reference(model: Any, task: Task) -> list[Case]:
    """What torch says, for every case; none is longer than the model's positions.

    Args:
        model: in float32, with the weights that the graph shall have.
        task: decides which cases there are.
    """
    return _decoder_cases(model, task) if task.generates else _encoder_cases(model, task)


def measure(graph: Graph, cases: Sequence[Case], bounds: Bounds) -> Parity:
    """Run a graph on all cases and compare, raising nothing; `bounds` decides what a near tie is."""
    parity = Parity()
    divergences, agreements = [], []
    for case in cases:
        got = _outputs(graph, case)
        shown = case.mask.bool() if got.dim() == 3 else torch.ones(len(got), dtype=torch.bool)
        mine, theirs = got[shown], case.expected[shown]
        scale = float(theirs.abs().max().clamp_min(1e-30))
        parity.errors[case.name] = float((mine - theirs).abs().max()) / scale
        if not graph.caches:
            continue
        ours, his = log_softmax(mine, -1), log_softmax(theirs, -1)
        divergences.append((his.exp() * (his - ours)).sum(-1))
        agreements.append(mine.argmax(-1) == theirs.argmax(-1))
        if case.greedy:
            _compare_tokens(parity, got, case, 2 * bounds.error * scale)
    if divergences:
        # Where the two agree, rounding may leave it a hair below zero.
        parity.divergence = max(0.0, float(torch.cat(divergences).mean()))
        parity.agreement = float(torch.cat(agreements).float().mean())
    return parity


def check(parity: Parity, bounds: Bounds, what: str) -> None:
    """Refuse a graph that does not compute what it should.

    Where no agreement of tokens is asked for, every greedy token has to be torch's, near ties apart.

    Raises:
        VerificationError: the first bound that does not hold, in figures.
    """
    found = _fault(parity, bounds)
    if found is not None:
        raise VerificationError(
            f"{what}: {found}",
            "products with rounded inputs are too coarse for this model: export with --accuracy-level 0"
            if bounds == INT8_ACTIVATIONS
            else "nothing was written: the graph does not compute what the model does",
        )


def _fault(parity: Parity, bounds: Bounds) -> str | None:
    for name, error in parity.errors.items():
        if not error <= bounds.error:
            return (
                f"{name}: outputs differ from torch's by {error:.2e} of the largest, "
                f"allowed are {bounds.error:.0e}"
            )
    divergence, agreement = parity.divergence, parity.agreement
    if bounds.divergence is not None and divergence is not None and not divergence <= bounds.divergence:
        return f"next tokens diverge by {divergence:.3g} nats, allowed are {bounds.divergence:.3g}"
    if bounds.agreement is None:
        flips = f"{parity.flips} of {parity.tokens} greedy tokens are not torch's, and no near ties"
        return flips if parity.flips else None
    if agreement is not None and not agreement >= bounds.agreement:
        return f"{agreement:.1%} of the likeliest tokens are torch's, asked are {bounds.agreement:.0%}"
    return None


def _outputs(graph: Graph, case: Case) -> torch.Tensor:
    """The graph's outputs of a case, read piece after piece, in float32."""
    where = positions(case.mask)
    past, start, parts = None, 0, []
    for piece in case.pieces:
        stop = start + piece
        segments = None if case.segments is None else case.segments[:, start:stop]
        outputs, past = graph.run(
            case.tokens[:, start:stop],
            past,
            mask=case.mask[:, :stop],
            positions=where[:, start:stop],
            segments=segments,
        )
        parts.append(outputs.float().cpu())
        start = stop
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _compare_tokens(parity: Parity, got: torch.Tensor, case: Case, tie: float) -> None:
    """Hold the likeliest tokens of every decoding step against torch's.

    A token may differ where torch's own top two are nearer than two errors apart, one for each.
    """
    start = case.pieces[0] - 1
    mine, theirs = got[:, start:], case.expected[:, start:]
    chosen = mine.argmax(-1, keepdim=True)
    best = theirs.argmax(-1, keepdim=True)
    margin = (theirs.gather(-1, best) - theirs.gather(-1, chosen)).squeeze(-1)
    differ = (chosen != best).squeeze(-1)
    parity.tokens += differ.numel()
    parity.near_ties += int((differ & (margin <= tie)).sum())
    parity.flips += int((differ & ~(margin <= tie)).sum())


def _decoder_cases(model: Any, task: Task) -> list[Case]:
    limit = _limit(model)
    long = min(_LONG, limit - 6)
    wanted: list[tuple[str, list[int], str, tuple[int, ...]]] = [
        ("one token", [1], "left", (1,)),
        ("odd length", [7], "left", (7,)),
        ("left padding", [6, 4, 1], "left", (6, 1, 2)),
        ("right padding", [6, 3, 5], "right", (6, 1, 2)),
        ("long past", [long, long], "left", (long, 5, 1)),
    ]
    cases = []
    for name, lengths, side, pieces in wanted:
        tokens, mask = _padded(model, lengths, side)
        further = _random(model, len(lengths), sum(pieces[1:]))
        tokens = torch.cat([tokens, further], dim=1)
        mask = pad(mask, (0, further.shape[1]), value=1)
        cases.append(Case(name, tokens, mask, pieces, _expected(model, task, tokens, mask)))
    tokens, mask = _padded(model, [_PROMPT, _PROMPT - 2], "left")
    steps = min(GREEDY_TOKENS, limit - _PROMPT) - 1
    tokens, mask = _continued(model, tokens, mask, steps)
    expected = _expected(model, task, tokens, mask)
    cases.append(Case("greedy", tokens, mask, (_PROMPT, *(1,) * steps), expected, greedy=True))
    return cases


def _encoder_cases(model: Any, task: Task) -> list[Case]:
    wanted = [
        ("one token", [1], "right"),
        ("odd length", [7], "right"),
        ("left padding", [6, 4, 1], "left"),
        ("right padding", [6, 3, 5], "right"),
        ("long", [min(_LONG, _limit(model) - 2)] * 2, "right"),
    ]
    cases = []
    for name, lengths, side in wanted:
        tokens, mask = _padded(model, lengths, side)
        segments = None
        if takes_segments(model):
            segments = (torch.arange(tokens.shape[1]) > tokens.shape[1] // 2).long().expand_as(tokens)
        expected = _expected(model, task, tokens, mask, segments)
        cases.append(Case(name, tokens, mask, (tokens.shape[1],), expected, segments))
    return cases


@torch.no_grad()
def _expected(
    model: Any,
    task: Task,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    segments: torch.Tensor | None = None,
) -> torch.Tensor:
    arguments: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask}
    if segments is not None:
        arguments["token_type_ids"] = segments
    if task.generates:
        arguments["use_cache"] = False
        if takes(model, "position_ids"):
            arguments["position_ids"] = positions(mask)
    return task.outputs(model(**arguments)).detach()


@torch.no_grad()
def _continued(
    model: Any, tokens: torch.Tensor, mask: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with the likeliest tokens behind them, and their mask."""
    cache, unread = DynamicCache(), tokens
    for _ in range(steps):
        arguments = {"input_ids": unread, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        if takes(model, "position_ids"):
            arguments["position_ids"] = positions(mask)[:, -unread.shape[1] :]
        unread = model(**arguments).logits[:, -1:].argmax(-1)
        tokens, mask = torch.cat([tokens, unread], dim=1), pad(mask, (0, 1), value=1)
    return tokens, mask


def _padded(model: Any, lengths: Sequence[int], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random sequences of these lengths, filled up to the longest, and their mask."""
    longest = max(lengths)
    mask = torch.zeros(len(lengths), longest, dtype=torch.int64)
    for row, length in zip(mask, lengths, strict=True):
        row[longest - length :] = 1
    mask = mask if side == "left" else mask.flip(1)
    return _random(model, len(lengths), longest).masked_fill(mask == 0, pad_token(model)), mask


def _random(model: Any, batch: int, length: int) -> torch.Tensor:
    """Random tokens, none of them the one that fills up: some models find a text's end by it."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(1000 * batch + length)
    drawn = torch.randint(1, vocabulary, (batch, length), generator=generator)
    return torch.remainder(drawn + pad_token(model), vocabulary)


def _limit(model: Any) -> int:
    """How many tokens the model was made for; many where it does not say."""
    named = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(named) if isinstance(named, int) and named > 0 else 1 << 16
