"""What all arms are measured on: the same tokens, documents and prompts, with a protocol that says which.

Made once, before anything is measured, and handed to every process as a file. Two figures may be compared
when their protocols are equal, and only then.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compress.bench.options import Options
from compress.core.artifact import Artifact
from compress.core.errors import CompressError, DataError, UsageError
from compress.data.corpora import Documents
from compress.models.load import tokenizer as load_tokenizer
from compress.models.tasks import Task

DEFAULT_WINDOW: Final = 2_048
ENCODER_LENGTH: Final = 512
_CHARACTERS_PER_TOKEN: Final = 8
_SAFE_END: Final = 64
"""Tokens before a cut that the cut may have changed."""


@dataclass(frozen=True)
class Material:
    """Tokens for one tokenizer.

    Attributes:
        sequences: int64 ``[length]`` each, to be scored; empty where nothing can be scored.
        labels: of the sequences, for classifiers with labelled data.
        prompts: int64 ``[batch, length]``, for timing.
        protocol: under which anything scored on it holds.
        reason: why nothing can be scored.
    """

    sequences: tuple[torch.Tensor, ...]
    labels: tuple[int, ...] | None
    prompts: torch.Tensor
    protocol: Mapping[str, Any]
    reason: str | None = None

    def save(self, file: Path) -> None:
        """Write it where a worker can read it."""
        lengths = torch.tensor([len(sequence) for sequence in self.sequences], dtype=torch.int64)
        tokens = torch.cat(self.sequences) if self.sequences else torch.zeros(0, dtype=torch.int64)
        tensors = {"tokens": tokens, "lengths": lengths, "prompts": self.prompts.contiguous()}
        if self.labels is not None:
            tensors["labels"] = torch.tensor(self.labels, dtype=torch.int64)
        note = json.dumps({"protocol": dict(self.protocol), "reason": self.reason})
        save_file(tensors, file, metadata={"material": note})

    @classmethod
    def load(cls, file: Path) -> "Material":
        """Read it back."""
        with safe_open(file, framework="pt") as opened:
            note = json.loads(opened.metadata()["material"])
            names = set(opened.keys())
            tensors = {name: opened.get_tensor(name) for name in names}
        sequences = tensors["tokens"].split(tensors["lengths"].tolist()) if len(tensors["lengths"]) else ()
        labels = tuple(tensors["labels"].tolist()) if "labels" in tensors else None
        return cls(tuple(sequences), labels, tensors["prompts"], note["protocol"], note["reason"])

    def batches(self, most: int) -> list[list[int]]:
        """Numbers of the sequences in batches of equal length, so that nothing is padded."""
        by_length: dict[int, list[int]] = {}
        for number, sequence in enumerate(self.sequences):
            by_length.setdefault(len(sequence), []).append(number)
        return [
            numbers[start : start + most]
            for _, numbers in sorted(by_length.items())
            for start in range(0, len(numbers), most)
        ]


def prepare(artifact: Artifact, task: Task, documents: Documents, options: Options) -> Material:
    """The material of an experiment, in the words of one model's tokenizer.

    A folder without a tokenizer can still be timed, on random tokens; nothing is scored then.

    Raises:
        DataError: the text is too short, or gives tokens that the model does not know.
        UsageError: the options make no window.
    """
    vocabulary = _vocabulary(artifact.config)
    try:
        tokenizer = load_tokenizer(artifact, trust_remote_code=options.trust_remote_code)
    except CompressError as error:
        generator = torch.Generator().manual_seed(options.seed)
        shape = (options.batch_size, _prompt_length(artifact, task, options))
        prompts = torch.randint(0, vocabulary, shape, generator=generator)
        return Material((), None, prompts, {"tokens": "random"}, error.message)
    labels = None
    if task.generates:
        sequences, protocol = _generation(artifact, tokenizer, documents, options)
    else:
        length = min(
            _positions(artifact.config) or ENCODER_LENGTH, ENCODER_LENGTH, tokenizer.model_max_length
        )
        texts = documents.texts[: options.documents]
        encoded = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        sequences = [torch.tensor(tokens, dtype=torch.int64) for tokens in encoded]
        labels = _labels(documents, len(texts), artifact.config)
        protocol = {"kind": "documents", "longest": length}
    tokens = torch.cat(sequences)
    if int(tokens.max()) >= vocabulary or int(tokens.min()) < 0:
        raise DataError(
            f"the tokenizer of {artifact.path.name} gives token {int(tokens.max())}, "
            f"the model knows {vocabulary:,}",
            "use the tokenizer that the model was trained with",
        )
    protocol = {
        **protocol,
        "text": documents.digest,
        "tokenizer": _identity(tokenizer),
        "tokens": hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest(),
        "sequences": len(sequences),
        "count": sum(len(sequence) for sequence in sequences),
    }
    prompts = _prompts(tokens, options.batch_size, _prompt_length(artifact, task, options))
    return Material(tuple(sequences), labels, prompts, protocol)


def _generation(
    artifact: Artifact, tokenizer: Any, documents: Documents, options: Options
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    positions = _positions(artifact.config)
    window = options.window or min(DEFAULT_WINDOW, positions or DEFAULT_WINDOW)
    if positions is not None and window > positions:
        raise UsageError(f"a window of {window} tokens, and the model has {positions} positions", "give less")
    if window < 2:
        raise UsageError(f"a window of {window} tokens predicts nothing", "give at least 2")
    by_document = options.protocol == "documents"
    bos = options.bos if options.bos is not None else by_document and tokenizer.bos_token_id is not None
    if bos and tokenizer.bos_token_id is None:
        raise UsageError("the tokenizer has no beginning-of-text token", "set bos: false")
    before = [tokenizer.bos_token_id] if bos else []
    protocol: dict[str, Any] = {
        "kind": options.protocol,
        "window": window,
        "stride": window,
        "bos": bool(bos),
    }
    if by_document:
        sequences = _by_document(tokenizer, documents.texts, before, window, options.tokens)
    else:
        protocol["join"] = options.join
        sequences = _windows(tokenizer, documents.texts, before, window, options)
    if not sequences:
        raise DataError(
            f"{documents.description} is too short to score: no sequence has two tokens", "give a longer text"
        )
    return [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences], protocol


def _by_document(
    tokenizer: Any, texts: Sequence[str], before: list[int], window: int, most: int
) -> list[list[int]]:
    """Each document by itself, cut at the window, up to a number of tokens in all."""
    sequences: list[list[int]] = []
    taken = 0
    for text in texts:
        if taken >= most:
            break
        tokens = [*before, *tokenizer.encode(text, add_special_tokens=False, verbose=False)][:window]
        if len(tokens) > 1:
            sequences.append(tokens)
            taken += len(tokens)
    return sequences


def _windows(
    tokenizer: Any, texts: Sequence[str], before: list[int], window: int, options: Options
) -> list[list[int]]:
    """Disjoint windows of the joined text. A rest that fills no window is left out, unless it is all."""
    joined = options.join.join(texts)
    characters = options.tokens * _CHARACTERS_PER_TOKEN
    while True:
        whole = characters >= len(joined)
        tokens = tokenizer.encode(joined[:characters], add_special_tokens=False, verbose=False)
        if whole or len(tokens) >= options.tokens + _SAFE_END:
            break
        characters *= 2
    tokens = tokens[: options.tokens]
    body = window - len(before)
    full = [[*before, *tokens[at : at + body]] for at in range(0, len(tokens) - body + 1, body)]
    rest = [*before, *tokens]
    return full or ([rest] if len(rest) > 1 else [])


def _prompts(tokens: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """``[batch, length]`` from the beginning of the tokens, which repeat where they are too few."""
    repeats = -(-batch * length // len(tokens))
    return tokens.repeat(repeats)[: batch * length].reshape(batch, length)


def _prompt_length(artifact: Artifact, task: Task, options: Options) -> int:
    positions = _positions(artifact.config)
    if positions is None:
        return options.prompt_length
    room = positions - (options.new_tokens + 1 if task.generates else 0)
    if room < 1:
        raise UsageError(
            f"{options.new_tokens} new tokens leave no room for a prompt in {positions} positions",
            "set bench option new_tokens",
        )
    return min(options.prompt_length, room)


def _labels(documents: Documents, count: int, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Label numbers of the first documents; none where the text has no labels."""
    if documents.records is None or any("label" not in record for record in documents.records[:count]):
        return None
    words = {str(word): int(number) for word, number in (config.get("label2id") or {}).items()}
    labels = []
    for record in documents.records[:count]:
        label = record["label"]
        if str(label) in words:
            labels.append(words[str(label)])
            continue
        try:
            labels.append(int(label))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"label {label!r} is no number and no label of the model",
                f"the model knows: {', '.join(words) or 'no labels by name'}",
            ) from error
    return tuple(labels)


def _identity(tokenizer: Any) -> str:
    """A hash of what a tokenizer knows, however its files are written."""
    words = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def _positions(config: Mapping[str, Any]) -> int | None:
    for part in (config, config.get("text_config") or {}):
        for key in ("max_position_embeddings", "n_positions"):
            value = part.get(key)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _vocabulary(config: Mapping[str, Any]) -> int:
    for part in (config, config.get("text_config") or {}):
        value = part.get("vocab_size")
        if isinstance(value, int) and value > 0:
            return value
    raise DataError("config.json says no vocab_size, so no tokens can be given to the model")
