"""Documents to train on, one by one, with labels where they have any: for encoders and classifiers.

A decoder reads a stream of text, cut into windows wherever that may be (`compress.data.training`). An
encoder reads one document at a time, from the token that opens it to the one that closes it, and a label
belongs to the whole of it. So documents are not joined here: each is one row, padded to the longest.

A row is its label, then its tokens, then padding: int64 ``[1 + length]``, with -1 for a label that is not
known and for padding. That is all that a loop over rows needs to hand on, and `compress.training.reading`
takes it apart. Labels are the field ``label`` of JSON lines and tables, a number or a name that the
model's configuration knows; a document without one is learned from as well.

A document with a label is cut after the most tokens of a row, as it is when a suite is scored. Of one
without, what lies behind is a row of its own, so that nothing of a running text is lost.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compress.core.errors import DataError, UsageError
from compress.core.run import CalibrationSource, TrainingSource
from compress.data import calibration, corpora, training
from compress.data.labels import NONE, number_of
from compress.data.training import HELD_OUT_SHARE, TrainingText, permutation

PADDING = -1
"""In place of a token."""
LABEL = "label"
"""The field of a record that holds its label."""

_CHARACTERS = calibration.CHARACTERS_PER_TOKEN


@dataclass(frozen=True)
class Reading:
    """How documents become rows.

    Attributes:
        tokenizer: of the student; may be missing where the texts are tokens.
        vocabulary: rows of the student's embedding; no token may lie beyond.
        length: tokens of a row, at most, those that open and close a document among them.
        classes: of a classifier; ``None`` leaves labels alone.
        config: the parsed ``config.json``, for labels by name.
    """

    tokenizer: calibration.Tokenizer | None
    vocabulary: int
    length: int
    classes: int | None
    config: Mapping[str, Any]


@dataclass(frozen=True)
class _Part:
    """A document, or a piece of one, before it is encoded."""

    text: str
    label: int


def draw(source: TrainingSource, reading: Reading, seed: int, *, rows: int, held_out: int) -> TrainingText:
    """Draw documents to train on and documents to validate on.

    Args:
        source: the texts, as in `compress.data.training.draw`. Of a text that has no other to be validated
            on, documents with a label are held out where it has any, so that progress can be told by them.
        rows: how many to train on, at most.
        held_out: how many to validate on, at most.
        seed: the same seed draws the same rows.

    Raises:
        DataError: missing, binary, a single document, a label that the model does not have, or tokens that it
            does not know.
        UsageError: numbers that make no row.
        EnvironmentFault: a text may not be read or cannot be reached.
    """
    if min(rows, held_out) < 1:
        raise UsageError(f"{rows} documents and {held_out} held out: both must be 1 or more")
    text, validation = training.texts_of(source)
    if validation is not None:
        trained = _rows(_drawn(text, reading, seed), rows, reading, text)
        judged = _rows(_drawn(validation, reading, seed), held_out, reading, validation)
        name = corpora.short_name(validation)
    else:
        both = _rows(_drawn(text, reading, seed), rows + held_out, reading, text)
        if len(both) < 2:
            raise DataError(
                f"{text} is one document of at most {reading.length} tokens, and one has to be held out",
                "give more text, or another one to validate on (--validation TEXT)",
            )
        kept = _held_out(both, min(held_out, max(1, int(len(both) * HELD_OUT_SHARE))))
        judged = both[kept]
        trained = both[[at for at in range(len(both)) if at not in set(kept)]][:rows]
        name = "held out of it"
    labelled = int((trained[:, 0] != NONE).sum())
    labels = f" ({labelled:,} with a label)" if reading.classes is not None else ""
    return TrainingText(
        trained.contiguous(),
        judged.contiguous(),
        f"{corpora.short_name(text)}: {len(trained):,} documents{labels} of up to {trained.shape[1] - 1} "
        f"tokens; validation on {len(judged):,}, {name}",
    )


def _held_out(rows: torch.Tensor, count: int) -> list[int]:
    """Which rows to hold out: the first with a label, or the first where none has one."""
    labelled = (rows[:, 0] != NONE).nonzero().flatten().tolist()
    # Half of them stay to be learned from, however many are asked for.
    return labelled[: min(count, max(1, len(labelled) // 2))] if len(labelled) > 1 else list(range(count))


def _drawn(text: str, reading: Reading, seed: int) -> Iterator[tuple[int, list[int]]]:
    """Labels and tokens in an order drawn by the seed."""
    if text.endswith(".safetensors"):
        present, width = training.shape_of_tokens(text)
        if width > reading.length:
            raise DataError(
                f"{text} holds sequences of {width} tokens, longer than {reading.length}",
                f"set --window {width}",
            )
        ready = CalibrationSource(text, present, width)
        tokens = calibration.draw(ready, None, seed, reading.vocabulary).tokens
        yield from ((NONE, row) for row in tokens.tolist())
        return
    if reading.tokenizer is None:
        raise DataError(
            "the model folder has no tokenizer, and training text needs one",
            "copy the tokenizer's files into it, or give tokens: a .safetensors file with 'input_ids'",
        )
    opening, closing = _frame(reading.tokenizer)
    room = reading.length - len(opening) - len(closing)
    if room < 1:
        raise UsageError(
            f"a window of {reading.length} tokens leaves no room for a text", "give a longer --window"
        )
    parts = list(_parts(text, reading, room * _CHARACTERS))
    for at in permutation(f"documents {seed}", len(parts)):
        part = parts[at]
        tokens_ = reading.tokenizer.encode(part.text, add_special_tokens=False, verbose=False)
        starts = range(0, len(tokens_), room) if part.label == NONE else range(1)
        for start in starts:
            yield part.label, [*opening, *tokens_[start : start + room], *closing]


def _parts(text: str, reading: Reading, characters: int) -> Iterator[_Part]:
    """Documents; one without a label in pieces, so that none has to be encoded as a whole."""
    found = corpora.documents(text)
    records: Sequence[Mapping[str, Any]] = found.records or [{}] * len(found.texts)
    for number, (document, record) in enumerate(zip(found.texts, records, strict=True), start=1):
        label = _label(record.get(LABEL), reading, f"{corpora.short_name(text)}, document {number}")
        if label != NONE:
            yield _Part(document, label)
            continue
        start = 0
        while start < len(document):
            end = min(start + characters, len(document))
            # Not within a word, where there is a blank in the second half.
            blank = document.rfind(" ", start + characters // 2, end) if end < len(document) else -1
            end = blank if blank > 0 else end
            if document[start:end].strip():
                yield _Part(document[start:end], NONE)
            start = end


def _label(label: object, reading: Reading, where: str) -> int:
    if reading.classes is None or label is None or label == "":
        return NONE
    if not isinstance(label, int | str) or isinstance(label, bool):
        raise DataError(f"{where}: label is {label!r}, expected a number or a name")
    number = number_of(label, reading.config)
    if number >= reading.classes:
        raise DataError(f"{where}: label {label!r}, and the model knows {reading.classes} labels")
    return number


def _frame(tokenizer: calibration.Tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer itself puts before a text and behind it."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    framed = tokenizer.encode("a", add_special_tokens=True)
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    return [], []


def _rows(drawn: Iterator[tuple[int, list[int]]], count: int, reading: Reading, text: str) -> torch.Tensor:
    """At most ``count`` rows, int64 ``[rows, 1 + longest]``."""
    found: list[tuple[int, list[int]]] = []
    for label, tokens in drawn:
        if not tokens:
            continue
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= reading.vocabulary:
            raise DataError(
                f"tokenizer does not fit: {text} gives token {low if low < 0 else high}, "
                f"the model's embedding has {reading.vocabulary:,} rows",
                "use the tokenizer that the model was trained with",
            )
        found.append((label, tokens))
        if len(found) == count:
            break
    if not found:
        raise DataError(f"{text} gives no document", "every one is empty once it is encoded")
    rows = torch.full((len(found), 1 + max(len(tokens) for _, tokens in found)), PADDING)
    for row, (label, tokens) in zip(rows, found, strict=True):
        row[0] = label
        row[1 : 1 + len(tokens)] = torch.tensor(tokens)
    return rows
