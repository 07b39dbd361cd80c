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

from compress.bench.metrics._throughput import Shape
from compress.bench.protocols import Sequences, sequences
from compress.core.artifact import Artifact
from compress.core.bench import Bench
from compress.core.errors import CompressError, DataError, UsageError
from compress.data.corpora import Documents
from compress.data.labels import number_of
from compress.models.load import tokenizer as load_tokenizer
from compress.models.positions import positions as model_positions
from compress.models.tasks import Task

ENCODER_LENGTH: Final = 512
_FINGERPRINT: Final = 16
"""Hexadecimal digits of a protocol's fingerprint."""


@dataclass(frozen=True)
class Material:
    """Tokens for one tokenizer.

    Attributes:
        sequences: int64 ``[length]`` each, to be scored; empty where nothing can be scored.
        labels: of the sequences, for classifiers with labelled data.
        prompts: int64 ``[batch, length]``, for timing.
        protocol: under which anything scored on it holds; its ``fingerprint`` is a hash of all the rest.
        reason: why nothing can be scored.
        starts: position of the first scored token of each sequence; empty where the task does not generate.
        clusters: which sequences belong together, where they are not independent.
        words, bytes: of the text that each sequence scores, where the protocol counts them.
    """

    sequences: tuple[torch.Tensor, ...]
    labels: tuple[int, ...] | None
    prompts: torch.Tensor
    protocol: Mapping[str, Any]
    reason: str | None = None
    starts: tuple[int, ...] = ()
    clusters: tuple[int, ...] | None = None
    words: tuple[float, ...] | None = None
    bytes: tuple[float, ...] | None = None

    def save(self, file: Path) -> None:
        """Write it where a worker can read it."""
        lengths = torch.tensor([len(sequence) for sequence in self.sequences], dtype=torch.int64)
        tokens = torch.cat(self.sequences) if self.sequences else torch.zeros(0, dtype=torch.int64)
        tensors = {"tokens": tokens, "lengths": lengths, "prompts": self.prompts.contiguous()}
        if self.labels is not None:
            tensors["labels"] = torch.tensor(self.labels, dtype=torch.int64)
        for name, column in (("starts", self.starts), ("clusters", self.clusters)):
            if column:
                tensors[name] = torch.tensor(column, dtype=torch.int64)
        for name, counts in (("words", self.words), ("bytes", self.bytes)):
            if counts is not None:
                tensors[name] = torch.tensor(counts, dtype=torch.float64)
        note = json.dumps({"protocol": dict(self.protocol), "reason": self.reason})
        save_file(tensors, file, metadata={"material": note})

    @classmethod
    def load(cls, file: Path) -> "Material":
        """Read it back."""
        with safe_open(file, framework="pt") as opened:
            note = json.loads(opened.metadata()["material"])
            names = set(opened.keys())
            tensors = {name: opened.get_tensor(name) for name in names}
        lengths = tensors["lengths"].tolist()
        split = tensors["tokens"].split(lengths) if lengths else ()
        columns = {
            name: tuple(tensors[name].tolist()) if name in tensors else None
            for name in ("labels", "starts", "clusters", "words", "bytes")
        }
        return cls(
            sequences=tuple(split),
            labels=columns["labels"],
            prompts=tensors["prompts"],
            protocol=note["protocol"],
            reason=note["reason"],
            starts=columns["starts"] or (),
            clusters=columns["clusters"],
            words=columns["words"],
            bytes=columns["bytes"],
        )

    def prompts_of(self, batch: int, length: int) -> torch.Tensor:
        """Prompts of another shape, int64 ``[batch, length]``, from the same tokens."""
        tokens = torch.cat(self.sequences) if self.sequences else self.prompts.flatten()
        return _prompts(tokens, batch, length)

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


def prepare(artifact: Artifact, task: Task, documents: Documents, options: Bench) -> Material:
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
    scored = Sequences()
    if task.generates:
        scored = sequences(tokenizer, documents, options, model_positions(artifact.config))
        listed, protocol = scored.tokens, scored.protocol
    else:
        length = min(
            model_positions(artifact.config) or ENCODER_LENGTH, ENCODER_LENGTH, tokenizer.model_max_length
        )
        texts = documents.texts[: options.documents]
        labels = _labels(documents, len(texts), artifact.config)
        if labels is not None:
            listed = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
            protocol = {"kind": "documents", "longest": length}
        else:
            scored = _passages(tokenizer, texts, length, options.documents)
            listed, protocol = scored.tokens, scored.protocol
    tensors = tuple(torch.tensor(each, dtype=torch.int64) for each in listed)
    tokens = torch.cat(tensors)
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
        "sequences": len(tensors),
        "count": len(tokens),
    }
    protocol["fingerprint"] = _fingerprint(protocol)
    return Material(
        sequences=tensors,
        labels=labels,
        prompts=_prompts(tokens, options.batch_size, _prompt_length(artifact, task, options)),
        protocol=protocol,
        starts=tuple(scored.starts),
        clusters=tuple(scored.documents) or None,
        words=tuple(scored.words) or None,
        bytes=tuple(scored.bytes) or None,
    )


def _passages(tokenizer: Any, texts: Sequence[str], longest: int, most: int) -> Sequences:
    """Texts cut where a model can take no more; passages of one text belong together, if there are others."""
    found = Sequences()
    for number, text in enumerate(texts):
        encoded = tokenizer(text, truncation=True, max_length=longest, return_overflowing_tokens=True)
        # A tokenizer written in Python gives the first passage, and the rest without its special tokens.
        passages = encoded["input_ids"] if tokenizer.is_fast else [encoded["input_ids"]]
        passages = passages[: most - len(found.tokens)]
        found.tokens += passages
        found.documents += [number] * len(passages)
        if len(found.tokens) == most:
            break
    alone = len(set(found.documents)) == 1
    if alone:
        found.documents = list(range(len(found.tokens)))
    clusters = "passage" if alone else "document"
    found.protocol = {"kind": "passages", "longest": longest, "clusters": clusters}
    return found


def _prompts(tokens: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """``[batch, length]`` from the beginning of the tokens, which repeat where they are too few."""
    repeats = -(-batch * length // len(tokens))
    return tokens.repeat(repeats)[: batch * length].reshape(batch, length)


def _prompt_length(artifact: Artifact, task: Task, options: Bench) -> int:
    """The length of the timed prompts, shortened to what the model takes; further shapes are not.

    Raises:
        UsageError: there is no room for a prompt, or for one of a further shape.
    """
    positions = model_positions(artifact.config)
    if positions is None:
        return options.prompt_length
    room = positions - (options.new_tokens + 1 if task.generates else 0)
    for shape in options.shapes:
        if Shape.of(shape).length > room:
            raise UsageError(
                f"the shape {shape} is longer than the {room} tokens that {artifact.path.name} takes",
                "give a shorter prompt, or fewer new tokens",
            )
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
    return tuple(number_of(record["label"], config) for record in documents.records[:count])


def _fingerprint(protocol: Mapping[str, Any]) -> str:
    """A short hash of a protocol: two figures may be compared when theirs are the same."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:_FINGERPRINT]


def _identity(tokenizer: Any) -> str:
    """A hash of what a tokenizer knows, however its files are written."""
    words = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def _vocabulary(config: Mapping[str, Any]) -> int:
    for part in (config, config.get("text_config") or {}):
        value = part.get("vocab_size")
        if isinstance(value, int) and value > 0:
            return value
    raise DataError("config.json says no vocab_size, so no tokens can be given to the model")
