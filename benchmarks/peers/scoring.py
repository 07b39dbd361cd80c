"""Scores dense quantized weights against the base model: KL divergence and loss per token.

One scorer for every program: the base is loaded by transformers in float32, the quantized
weights are put in place of its own, and both see the same windows. The base's probabilities are
computed once a batch for all the weights scored together.

Two sets of windows:

- *divergence*: of each document of the validation text the same number of disjoint windows,
  spread evenly over it, so that no document counts more than another. KL(base || quantized) is
  averaged over every position but the last of a window. One number a window is kept.
- *loss*: the published protocol of the base model's own figure: the first 40,960 tokens of the
  text, disjoint windows of 256, 255 targets each; nats a token.
"""

import gzip
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from calibration import document_windows, read_documents
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.func import functional_call
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

LENGTH = 256
PROTOCOL_TOKENS = 40_960
BATCH = 4  # windows; logits that stay in the cache are faster than large batches


@dataclass(frozen=True)
class Windows:
    """What is scored: token windows [n, length], and the document of each divergence window."""

    divergence: torch.Tensor
    document: list[int]
    loss: torch.Tensor


@dataclass
class Score:
    """Per window: the mean divergence and the mean loss over its targets."""

    divergence: list[float]
    loss: list[float]

    def save(self, path: Path, key: str) -> None:
        path.write_text(json.dumps({"key": key, **asdict(self)}) + "\n")


def make_windows(model: Path, text: Path, per_document: int) -> Windows:
    """The windows of a validation text; a document too short for its share is refused."""
    documents = read_documents(text)
    chosen, owner = [], []
    for index, windows in enumerate(document_windows(model, documents, LENGTH)):
        if windows.shape[0] < per_document:
            raise ValueError(f"document {index} has {windows.shape[0]} windows of {LENGTH}")
        places = torch.linspace(0, windows.shape[0] - 1, per_document).round().to(torch.int64)
        chosen.append(windows[places])
        owner += [index] * per_document
    with gzip.open(text, "rt", encoding="utf-8") as file:
        stream = file.read()
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = tokenizer.encode(stream[: PROTOCOL_TOKENS * 8], add_special_tokens=False).ids
    loss = torch.tensor(ids[:PROTOCOL_TOKENS], dtype=torch.int64).view(-1, LENGTH)
    return Windows(torch.cat(chosen), owner, loss)


def load_base(model: Path) -> PreTrainedModel:
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    base.train(False)
    return base


def next_token_logits(
    base: PreTrainedModel, weights: dict[str, torch.Tensor], ids: torch.Tensor
) -> torch.Tensor:
    """Logits [windows, length - 1, vocabulary] of the next token, with `weights` in place."""
    logits: torch.Tensor = functional_call(base, weights, (ids,), {"use_cache": False}).logits
    return logits[:, :-1]


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || logits) of each position.

    Written so that the vocabulary is reduced twice and nothing of its size is kept: sum p (a - b)
    - (log sum exp a - log sum exp b), where p is the softmax of a.
    """
    gap = (reference.softmax(-1) * (reference - logits)).sum(-1)
    return gap - (reference.logsumexp(-1) - logits.logsumexp(-1))


@torch.inference_mode()
def divergences(
    base: PreTrainedModel, windows: torch.Tensor, weights: list[dict[str, torch.Tensor]]
) -> list[list[float]]:
    """For each set of weights, the mean divergence from the base of each window."""
    results: list[list[float]] = [[] for _ in weights]
    for ids in torch.split(windows, BATCH):
        reference = next_token_logits(base, {}, ids)
        for tensors, result in zip(weights, results, strict=True):
            gap = divergence(reference, next_token_logits(base, tensors, ids))
            result += gap.mean(-1).tolist()
    return results


@torch.inference_mode()
def losses(
    base: PreTrainedModel, windows: torch.Tensor, weights: list[dict[str, torch.Tensor]]
) -> list[list[float]]:
    """For each set of weights, the mean loss of each window; no weights means the base itself."""
    results: list[list[float]] = [[] for _ in weights]
    for ids in torch.split(windows, BATCH):
        for tensors, result in zip(weights, results, strict=True):
            logits = next_token_logits(base, tensors, ids)
            lost = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            result += lost.mean(-1).tolist()
    return results


def read_weights(base: PreTrainedModel, path: Path) -> dict[str, torch.Tensor]:
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
    found = zip(
        divergences(base, windows.divergence, weights),
        losses(base, windows.loss, weights),
        strict=True,
    )
    return [Score(divergence, loss) for divergence, loss in found]
