"""Scores dense quantized weights against the base model, per window of held-out text.

One scorer for every program: the base is loaded by transformers in float32, the quantized
weights are put in place of its own, and both see the same windows. What the base says is
computed once a batch for all the weights scored together. Two numbers a window:

- of a language model, the *divergence* KL(base || quantized), averaged over every position but the last,
  and the *loss*, nats a token. Its windows may be others: the published protocol of `gutenberg-4m` takes
  the first 40,960 tokens of the text in disjoint windows of 256, 255 targets each.
- of an encoder, which has no probabilities, the *divergence* is 1 less the cosine of the window's
  embedding, its mean state, with the base's; the *loss* is the squared error of its states relative to
  the sum of their squares. Both are zero for the base itself.

Of each document the same number of windows is taken, spread evenly over it, so that no document counts
more than another.
"""

import gzip
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from calibration import document_windows, read_documents
from cell import automatic_class
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.func import functional_call
from torch.nn import functional
from transformers import PreTrainedModel

LENGTH = 256
PROTOCOL_TOKENS = 40_960
BATCH = 4  # windows; logits that stay in the cache are faster than large batches

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Windows:
    """What is scored: token windows [n, length], the document of each, and the windows of the loss.

    `loss` is `None` where it is taken on the same windows.
    """

    scored: torch.Tensor
    document: list[int]
    loss: torch.Tensor | None = None

    @property
    def of_loss(self) -> torch.Tensor:
        return self.scored if self.loss is None else self.loss


@dataclass
class Score:
    """Per window: the mean divergence and the mean loss over its targets."""

    divergence: list[float]
    loss: list[float]

    def save(self, path: Path, key: str) -> None:
        path.write_text(json.dumps({"key": key, **asdict(self)}) + "\n")


def spread_windows(found: list[torch.Tensor], per_document: int) -> Windows:
    """Of each document's windows [n, length] as many; a document too short for its share is refused."""
    chosen, owner = [], []
    for index, windows in enumerate(found):
        if windows.shape[0] < per_document:
            raise ValueError(f"document {index} has {windows.shape[0]} windows, not {per_document}")
        places = torch.linspace(0, windows.shape[0] - 1, per_document).round().to(torch.int64)
        chosen.append(windows[places])
        owner += [index] * per_document
    return Windows(torch.cat(chosen), owner)


def packed_windows(windows: torch.Tensor, count: int) -> Windows:
    """`count` windows of joined documents, spread evenly; each is a cluster of its own.

    A document that ends in one window and begins in another is in both; with many a window that is little,
    and windows that are chosen are rarely neighbours.
    """
    spread = spread_windows([windows], count)
    return Windows(spread.scored, list(range(count)))


def loss_windows(model: Path, text: Path) -> torch.Tensor:
    """The windows of the published protocol."""
    with gzip.open(text, "rt", encoding="utf-8") as file:
        stream = file.read()
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = tokenizer.encode(stream[: PROTOCOL_TOKENS * 8], add_special_tokens=False).ids
    return torch.tensor(ids[:PROTOCOL_TOKENS], dtype=torch.int64).view(-1, LENGTH)


def make_windows(model: Path, text: Path, per_document: int) -> Windows:
    """The windows of a validation text, and those of the published protocol."""
    spread = spread_windows(document_windows(model, read_documents(text), LENGTH), per_document)
    return Windows(spread.scored, spread.document, loss_windows(model, text))


def load_base(model: Path) -> PreTrainedModel:
    base: PreTrainedModel = automatic_class(model).from_pretrained(model, dtype=torch.float32)
    base.train(False)
    return base


def has_probabilities(base: PreTrainedModel) -> bool:
    """Whether it is a language model with its head, and not an encoder."""
    return base.get_output_embeddings() is not None


def next_token_logits(base: PreTrainedModel, weights: Weights, ids: torch.Tensor) -> torch.Tensor:
    """Logits [windows, length - 1, vocabulary] of the next token, with `weights` in place."""
    logits: torch.Tensor = functional_call(base, weights, (ids,), {"use_cache": False}).logits
    return logits[:, :-1]


def states(base: PreTrainedModel, weights: Weights, ids: torch.Tensor) -> torch.Tensor:
    """The last states [windows, length, width] of an encoder, with `weights` in place."""
    found: torch.Tensor = functional_call(base, weights, (ids,)).last_hidden_state
    return found


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || logits) of each position.

    Written so that the vocabulary is reduced twice and nothing of its size is kept: sum p (a - b)
    - (log sum exp a - log sum exp b), where p is the softmax of a.
    """
    gap = (reference.softmax(-1) * (reference - logits)).sum(-1)
    return gap - (reference.logsumexp(-1) - logits.logsumexp(-1))


def cosine_distance(reference: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """1 less the cosine of the mean states, of each window, from states [windows, length, width].

    In float64: where two vectors are close, float32 leaves few digits of the difference.
    """
    embeddings = (each.double().mean(1) for each in (reference, changed))
    return 1 - functional.cosine_similarity(*embeddings, dim=-1)


def squared_error(reference: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """The squared error of states [windows, length, width], relative to their squares, of each window."""
    return (changed - reference).square().sum((1, 2)) / reference.square().sum((1, 2))


@torch.inference_mode()
def divergences(base: PreTrainedModel, windows: torch.Tensor, weights: list[Weights]) -> list[list[float]]:
    """For each set of weights, the mean divergence from the base of each window."""
    results: list[list[float]] = [[] for _ in weights]
    for ids in torch.split(windows, BATCH):
        reference = next_token_logits(base, {}, ids)
        for tensors, result in zip(weights, results, strict=True):
            gap = divergence(reference, next_token_logits(base, tensors, ids))
            result += gap.mean(-1).tolist()
    return results


@torch.inference_mode()
def losses(base: PreTrainedModel, windows: torch.Tensor, weights: list[Weights]) -> list[list[float]]:
    """For each set of weights, the mean loss of each window; no weights means the base itself."""
    results: list[list[float]] = [[] for _ in weights]
    for ids in torch.split(windows, BATCH):
        for tensors, result in zip(weights, results, strict=True):
            logits = next_token_logits(base, tensors, ids)
            lost = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            result += lost.mean(-1).tolist()
    return results


@torch.inference_mode()
def distances(base: PreTrainedModel, windows: torch.Tensor, weights: list[Weights]) -> list[Score]:
    """For each set of weights of an encoder, its distances from the base."""
    results = [Score([], []) for _ in weights]
    for ids in torch.split(windows, BATCH):
        reference = states(base, {}, ids)
        for tensors, result in zip(weights, results, strict=True):
            changed = states(base, tensors, ids)
            result.divergence += cosine_distance(reference, changed).tolist()
            result.loss += squared_error(reference, changed).tolist()
    return results


def read_weights(base: PreTrainedModel, path: Path) -> Weights:
    """The weights of one cell; a name or a shape that the base lacks is refused."""
    weights = load_file(path)
    held = base.state_dict()
    for name, tensor in weights.items():
        if name not in held or held[name].shape != tensor.shape:
            raise ValueError(f"{path}: the base has no {name} of shape {list(tensor.shape)}")
    return weights


def score(base: PreTrainedModel, windows: Windows, paths: list[Path]) -> list[Score]:
    """Scores of the `dense.safetensors` files, in their order."""
    weights = [read_weights(base, path) for path in paths]
    if not has_probabilities(base):
        return distances(base, windows.scored, weights)
    found = zip(
        divergences(base, windows.scored, weights),
        losses(base, windows.of_loss, weights),
        strict=True,
    )
    return [Score(divergence, loss) for divergence, loss in found]
