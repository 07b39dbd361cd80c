"""BEFORE's distributions in a file, so that BEFORE need not run again beside each AFTER.

At each scored position the file holds the most likely tokens with their log-probabilities, the logarithm of
what all other tokens share, the most likely token and the log-probability of the text's own: under 1 KB.
It says which model, tokens, protocol and precision it is of, and is refused for any other.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from compress.bench.material import Material
from compress.core.artifact import Artifact
from compress.core.bench import Bench
from compress.core.errors import DataError, EnvironmentFault
from compress.numerics.buckets import Buckets, buckets

MOST_BYTES: Final = 999
"""Of one position in the file."""
_FIXED_BYTES: Final = 12
"""Tail, most likely token and the text's own log-probability."""
_SHORT_NUMBERS: Final = 2**16
"""The largest vocabulary whose tokens fit two bytes."""
_FORMAT: Final = 1
_TENSORS: Final = ("tokens", "log_probabilities", "tail", "first", "targets", "lengths")
_LIKE: Final = "remove the file, and it is written again while BEFORE is scored; or name another"


def kept(vocabulary: int) -> int:
    """How many tokens of a position are kept."""
    number = 2 if vocabulary <= _SHORT_NUMBERS else 4
    return min(vocabulary, (MOST_BYTES - _FIXED_BYTES) // (number + 4))


def identity(artifact: Artifact, runtime: str, material: Material, options: Bench) -> dict[str, Any]:
    """Of what distributions are: equal identities give equal distributions."""
    protocol = {name: material.protocol.get(name) for name in ("kind", "window", "bos", "targets", "tokens")}
    return {"model": artifact.digest, "runtime": runtime, **protocol, "dtype": options.scoring_dtype}


@dataclass(frozen=True)
class LogProbabilities:
    """What a file holds.

    Attributes:
        vocabulary: how many logits a position has.
        parts: of each sequence the buckets and float32 ``[targets]``, the log-probability of each target.
    """

    identity: Mapping[str, Any]
    vocabulary: int
    parts: tuple[tuple[Buckets, torch.Tensor], ...]

    @property
    def most(self) -> int:
        """Tokens of each position."""
        return int(self.parts[0][0].tokens.shape[-1])

    def save(self, file: Path) -> None:
        """Write it; a file of this name is replaced.

        Raises:
            EnvironmentFault: it cannot be written.
        """
        number = torch.uint16 if self.vocabulary <= _SHORT_NUMBERS else torch.int32
        all_buckets = [part for part, _ in self.parts]
        tensors = {
            "tokens": torch.cat([part.tokens for part in all_buckets]).to(number),
            "log_probabilities": torch.cat([part.log_probabilities for part in all_buckets]),
            "tail": torch.cat([part.tail for part in all_buckets]),
            "first": torch.cat([part.first for part in all_buckets]),
            "targets": torch.cat([targets for _, targets in self.parts]),
            "lengths": torch.tensor([len(targets) for _, targets in self.parts], dtype=torch.int64),
        }
        note = {"format": _FORMAT, "identity": dict(self.identity), "vocabulary": self.vocabulary}
        partial = file.with_name(file.name + ".partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata={"log_probabilities": json.dumps(note)})
            partial.replace(file)
        except OSError as error:
            raise EnvironmentFault(f"{file} cannot be written: {error.strerror or error}") from error

    @classmethod
    def load(cls, file: Path, expected: Mapping[str, Any]) -> "LogProbabilities":
        """Read a file.

        Args:
            expected: the identity that it must have.

        Raises:
            DataError: it is damaged, of another format, or of something else; the message says of what.
        """
        try:
            with safe_open(file, framework="pt") as opened:
                note = _checked(file, opened.metadata(), expected)
                tensors = {name: opened.get_tensor(name) for name in _TENSORS}
        except (SafetensorError, OSError) as error:
            raise DataError(f"{file} holds no log-probabilities: {error}", _LIKE) from error
        lengths = tensors.pop("lengths").tolist()
        whole = {len(tensor) for tensor in tensors.values()}
        if whole != {sum(lengths)}:
            raise DataError(f"{file} is damaged: its columns have {sorted(whole)} positions", _LIKE)
        tokens = tensors["tokens"].to(torch.int32)
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < int(note["vocabulary"]):
            raise DataError(f"{file} is damaged: it holds tokens that are not in the vocabulary", _LIKE)
        split = {
            "tokens": tokens.split(lengths),
            "log_probabilities": tensors["log_probabilities"].split(lengths),
            "tail": tensors["tail"].split(lengths),
            "first": tensors["first"].split(lengths),
        }
        rows = zip(*split.values(), strict=True)
        parts = tuple(
            (Buckets(*row), targets)
            for row, targets in zip(rows, tensors["targets"].split(lengths), strict=True)
        )
        return cls(note["identity"], int(note["vocabulary"]), parts)


def check(file: Path, expected: Mapping[str, Any]) -> None:
    """Refuse a file that is there and is not what it should be, reading only its beginning.

    Raises:
        DataError: as `LogProbabilities.load`.
    """
    if not file.exists():
        return
    try:
        with safe_open(file, framework="pt") as opened:
            _checked(file, opened.metadata(), expected)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file} holds no log-probabilities: {error}", _LIKE) from error


def _checked(file: Path, metadata: Mapping[str, str] | None, expected: Mapping[str, Any]) -> Any:
    try:
        note = json.loads((metadata or {})["log_probabilities"])
        found, shape = dict(note["identity"]), note["format"]
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{file} holds no log-probabilities, expected a file written by bench", _LIKE
        ) from error
    if shape != _FORMAT:
        raise DataError(f"{file} is of format {shape}, expected {_FORMAT}", _LIKE)
    differing = [name for name in expected if found.get(name) != expected[name]]
    if differing:
        told = "; ".join(
            f"{name} {found.get(name)!s:.24} instead of {expected[name]!s:.24}" for name in differing
        )
        raise DataError(f"{file} holds the log-probabilities of something else: {told}", _LIKE)
    return note


@final
@dataclass
class Recorder:
    """Takes distributions while a model is scored.

    Attributes:
        sequences: how many there will be.
        file: where they go.
    """

    identity: Mapping[str, Any]
    sequences: int
    file: Path
    vocabulary: int = 0
    parts: dict[int, tuple[Buckets, torch.Tensor]] = field(default_factory=dict)

    def add(self, number: int, logits: torch.Tensor, loss: torch.Tensor) -> None:
        """A sequence.

        Args:
            logits: ``[targets, vocabulary]``.
            loss: nats of each target, ``[targets]``.
        """
        self.vocabulary = logits.shape[-1]
        found = buckets(logits, kept(self.vocabulary))
        self.parts[number] = (
            Buckets(
                found.tokens.to("cpu", torch.int32),
                found.log_probabilities.cpu(),
                found.tail.cpu(),
                found.first.to("cpu", torch.int32),
            ),
            -loss.float().cpu(),
        )

    def save(self) -> None:
        """Write them; nothing where a sequence is missing, because nothing was scored.

        Raises:
            EnvironmentFault: the file cannot be written.
        """
        if self.sequences and set(self.parts) == set(range(self.sequences)):
            parts = tuple(self.parts[number] for number in range(self.sequences))
            LogProbabilities(self.identity, self.vocabulary, parts).save(self.file)


def check_options(artifact: Artifact, runtime: str, material: Material, options: Bench) -> None:
    """Refuse options that name a file of something else than this reference model, before it is run.

    Raises:
        DataError: as `LogProbabilities.load`.
    """
    if options.stored_log_probabilities is not None and material.starts:
        check(Path(options.stored_log_probabilities), identity(artifact, runtime, material, options))


def stored(artifact: Artifact, runtime: str, material: Material, options: Bench) -> LogProbabilities | None:
    """A reference model's distributions; none where the options name no file or it is not written yet.

    Raises:
        DataError: the file is of something else.
    """
    if options.stored_log_probabilities is None or not Path(options.stored_log_probabilities).exists():
        return None
    expected = identity(artifact, runtime, material, options)
    return LogProbabilities.load(Path(options.stored_log_probabilities), expected)


def recorder(artifact: Artifact, runtime: str, material: Material, options: Bench) -> Recorder | None:
    """What records a reference model's distributions; none where that is not wanted or was done before.

    Raises:
        DataError: there is a file, and it is of something else.
    """
    if options.stored_log_probabilities is None or not material.starts:
        return None
    expected = identity(artifact, runtime, material, options)
    file = Path(options.stored_log_probabilities)
    check(file, expected)
    return None if file.exists() else Recorder(expected, len(material.sequences), file)
