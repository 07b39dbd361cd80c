"""Texts: what a user may name as TEXT, read as documents, always the same way.

A source is one of

- a text file, plain or ``.gz``, UTF-8. Where ``<|endoftext|>`` occurs it parts documents; without it the
  file is one document. Documents are stripped of white space at both ends, empty ones dropped;
- JSON lines (``.jsonl``, ``.json``, ``.ndjson``, also ``.gz``): one object a line, one document each;
- a table (``.tsv`` or ``.csv``, also ``.gz``) whose first line names its columns: one document a row. The
  cells of a ``.csv`` may be quoted, and then hold commas and line ends; those of a ``.tsv`` are taken as
  they are;
- ``hf:NAME[:CONFIG][:SPLIT][:COLUMN]``, or a plain hub id, read through the optional package
  ``datasets``; a part may be left empty (``hf:wikitext:wikitext-2-raw-v1::text``). Without a split
  ``train`` is taken, without a column ``text``;
- ``builtin:stories``, the text that ships with the package (`compress.data.builtin`), or one split of it
  by name: ``builtin:stories/train``. Without a split it is ``test``; a caller whose use is another asks
  `in_split`.

Records (JSON lines, tables) keep all their fields beside the text. The text is the field named after a
colon (``train.jsonl:dialogue``; joined without anything between by ``+``:
``lambada.jsonl.gz:context+continuation``), else the first of ``text``, ``sentence``, ``context`` and
``query`` that the first record has.

Nothing is skipped in silence: a byte that is not text, a line that does not parse or a record without
its field is an error that says where it is.
"""

import csv
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from compress.core.artifact import file_digest
from compress.core.errors import DataError, UsageError, did_you_mean
from compress.data.builtin import texts as builtin
from compress.data.builtin.splits import Split
from compress.data.bytestreams import characters, check_readable, json_lines, lines, near_names
from compress.data.hub import HubName, hub_records

SEPARATOR = "<|endoftext|>"
TEXT_FIELDS = ("text", "sentence", "context", "query")

_RECORD_SUFFIXES = (".jsonl", ".json", ".ndjson")
_TABLE_SUFFIXES = (".tsv", ".csv")
_FILE_SUFFIXES = (*_RECORD_SUFFIXES, *_TABLE_SUFFIXES, ".txt", ".text", ".gz", ".md", ".safetensors")
_LEFT_OUT = " \t\n\r\v\f"
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Documents:
    """The documents of a source, in its order.

    Attributes:
        texts: the documents, none of them empty.
        digest: SHA-256 over the texts and records; independent of the path and of compression.
        records: the objects that the texts come from, for JSON lines, tables and hub data sets;
            ``None`` for plain text. As long as ``texts``.
        description: for reports: the name of the source and how many documents and characters it gave.
    """

    texts: list[str]
    digest: str
    records: list[dict[str, Any]] | None
    description: str


class Piece(NamedTuple):
    """A part of a document; ``last`` on the part that ends it."""

    text: str
    last: bool


def documents(source: str, *, limit: int | None = None) -> Documents:
    """Read a source.

    Args:
        source: what the user named; see the module's documentation.
        limit: read no further than this many documents; memory is then bounded by them.

    Raises:
        DataError: the source is missing, empty, binary or damaged.
        UsageError: no built-in text or split has this name, or the limit is no positive number.
        EnvironmentFault: no permission, no network, or the package ``datasets`` is missing.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit of documents is {limit}, expected at least 1")
    found = _locate(source)
    digest = hashlib.sha256()
    texts: list[str] = []
    records: list[dict[str, Any]] | None = None
    if found.holds_records:
        records = []
        for record, text in itertools.islice(_texts_of_records(found), limit):
            texts.append(text)
            records.append(record)
            _update(digest, text)
            _update(digest, json.dumps(record, sort_keys=True, ensure_ascii=True, default=repr))
    else:
        for text in itertools.islice(_joined(_pieces_of_text(found)), limit):
            texts.append(text)
            _update(digest, text)
    if not texts:
        raise DataError(f"{found.title} holds no text", "every document in it is empty")
    total = sum(map(len, texts))
    noun = "document" if len(texts) == 1 else "documents"
    return Documents(
        texts, digest.hexdigest(), records, f"{found.title} ({len(texts):,} {noun}, {total:,} characters)"
    )


def pieces(source: str) -> Iterator[Piece]:
    """The documents of a source as a stream of parts, for readers that must not hold a whole text.

    Raises:
        DataError, UsageError, EnvironmentFault: as `documents`; a source without text gives nothing.
    """
    found = _locate(source)
    if found.holds_records:
        for _, text in _texts_of_records(found):
            yield Piece(text, last=True)
    else:
        yield from _pieces_of_text(found)


def check(source: str) -> None:
    """Refuse a source that is missing, unreadable, empty or binary, reading only its beginning.

    Hub data sets are not touched: that would download them.

    Raises:
        DataError, UsageError, EnvironmentFault: as `documents`.
    """
    found = _locate(source)
    if found.hub is None and next(pieces(source), None) is None:
        raise DataError(f"{found.title} holds no text", "every document in it is empty")


def content_digest(source: str) -> str:
    """An identity of the contents, as cheap as the source allows.

    Of a file, its bytes (remembered by path, size and time, so that a second call reads nothing) and
    the name of its text field; of a hub data set or a built-in text, the documents that it gives.

    Raises:
        DataError, UsageError, EnvironmentFault: as `documents`.
    """
    found = _locate(source)
    if found.builtin is not None:
        return _digest_of_builtin(found.title)
    if found.file is None:
        return documents(source).digest
    check_readable(found.file)
    return hashlib.sha256(f"{file_digest(found.file)}\0{found.fields}".encode()).hexdigest()


def file_of(source: str) -> Path | None:
    """The file that a source names, or ``None`` for a hub data set and a built-in text.

    Raises:
        DataError: it names a file that is missing.
        UsageError: no built-in text has this name.
    """
    return _locate(source).file


def short_name(source: str) -> str:
    """What reports call a source: without its folder."""
    return source if source.startswith("builtin:") else source.rsplit("/", 1)[-1]


def in_split(source: str, split: Split) -> str:
    """The source itself, or this split of a built-in text of which none is named.

    What a text is read for decides what may be read: a model is calibrated, trained and judged on
    splits that share nothing.
    """
    return f"{source}/{split}" if builtin.is_whole(source) else source


@dataclass(frozen=True)
class _Located:
    """A source, found: a file, a hub data set or a built-in text, and the fields that make its text."""

    title: str
    file: Path | None = None
    builtin: Split | None = None
    hub: HubName | None = None
    fields: str = ""

    @property
    def plain_suffix(self) -> str:
        """The suffix that tells the kind of file, ``.gz`` aside."""
        if self.file is None:
            return ""
        return Path(self.file.name.removesuffix(".gz")).suffix.lower()

    @property
    def holds_records(self) -> bool:
        """Whether the source gives records rather than running text."""
        return self.hub is not None or self.plain_suffix in (*_RECORD_SUFFIXES, *_TABLE_SUFFIXES)


def _locate(source: str) -> _Located:
    if not source.strip():
        raise UsageError("the name of a text is empty", "give a file, a hub data set or builtin:NAME")
    if source.startswith("builtin:"):
        source = in_split(source, Split.TEST)
        return _Located(source, builtin=builtin.split_named(source))
    if source.startswith("hf:"):
        name = HubName.parse(source)
        return _Located(source, hub=name, fields=name.column)
    path = Path(source).expanduser()
    if _exists(path):
        return _Located(path.name, file=path)
    bare, colon, fields = source.rpartition(":")
    if colon and _exists(Path(bare).expanduser()):
        located = _Located(source.rsplit("/", 1)[-1], file=Path(bare).expanduser(), fields=fields)
        if not located.holds_records:
            raise UsageError(
                f"'{source}' names a field of {bare}, which holds plain text",
                "fields are for JSON lines (.jsonl) and tables (.tsv, .csv)",
            )
        return located
    if _looks_like_a_file(source):
        near = near_names(path)
        raise DataError(f"no text at {source}", near or "give a file, a hub data set or builtin:NAME")
    name = HubName.parse(source)
    return _Located(source, hub=name, fields=name.column)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # A name too long, or a folder on the way that may not be entered: opening it says which.
        return len(path.name) < 256


def _looks_like_a_file(source: str) -> bool:
    head = source.partition(":")[0]
    return (
        head.endswith(_FILE_SUFFIXES)
        or head.startswith((".", "/", "~"))
        or head.count("/") > 1
        or ("/" in head and Path(head).parent.is_dir())
    )


@cache
def _digest_of_builtin(source: str) -> str:
    # The text does not change while a process runs, and making it takes a second.
    return documents(source).digest


def _pieces_of_text(found: _Located) -> Iterator[Piece]:
    if found.builtin is not None:
        return (Piece(text, last=True) for text in builtin.text(found.builtin))
    if found.file is None:
        return iter(())
    return _split(characters(found.file))


def _split(chunks: Iterator[str]) -> Iterator[Piece]:
    """Running text cut at the separator, with the white space at a document's ends left out."""
    held = ""  # characters that may still turn out to be part of a separator, or space at the end
    begun = False
    for chunk in chunks:
        held += chunk
        *ended, held = held.split(SEPARATOR)
        for text in ended:
            yield from _closing(text, begun)
            begun = False
        if not begun:
            held = held.lstrip(_LEFT_OUT)
        settled = held[: max(len(held) - len(SEPARATOR) + 1, 0)].rstrip(_LEFT_OUT)
        if settled:
            begun = True
            held = held[len(settled) :]
            yield Piece(settled, last=False)
    yield from _closing(held, begun)


def _closing(text: str, begun: bool) -> Iterator[Piece]:
    """The last piece of a document; none where the document is empty."""
    text = text.rstrip(_LEFT_OUT) if begun else text.strip(_LEFT_OUT)
    if text or begun:
        yield Piece(text, last=True)


def _joined(stream: Iterable[Piece]) -> Iterator[str]:
    parts: list[str] = []
    for piece in stream:
        parts.append(piece.text)
        if piece.last:
            yield "".join(parts)
            parts = []


def _texts_of_records(found: _Located) -> Iterator[tuple[dict[str, Any], str]]:
    """Records with their texts; those whose text is empty are left out, as empty documents are."""
    fields = tuple(part for part in found.fields.split("+") if part)
    for place, record in _records(found):
        if not fields:
            fields = _default_fields(record, found, place)
        text = "".join(_string(record, field, found, place) for field in fields).strip(_LEFT_OUT)
        if text:
            yield record, text


def _default_fields(record: Mapping[str, Any], found: _Located, place: str) -> tuple[str, ...]:
    for name in TEXT_FIELDS:
        if isinstance(record.get(name), str):
            return (name,)
    strings = sorted(name for name, value in record.items() if isinstance(value, str))
    if found.hub is not None and len(strings) == 1:
        return (strings[0],)
    example = strings[0] if strings else "FIELD"
    raise DataError(
        f"{found.title}, {place} has no field 'text', but {', '.join(strings) or 'none that holds text'}",
        f"name one after a colon: {found.title}:{example}"
        if found.hub is None
        else f"name a column: hf:NAME:CONFIG:SPLIT:{example}",
    )


def _string(record: Mapping[str, Any], field: str, found: _Located, place: str) -> str:
    if field not in record:
        raise DataError(f"{found.title}, {place} has no field '{field}'", did_you_mean(field, record))
    value = record[field]
    if not isinstance(value, str):
        raise DataError(
            f"{found.title}, {place}: field '{field}' is {type(value).__name__}, expected a string"
        )
    if _SURROGATE.search(value):
        raise DataError(f"{found.title}, {place}: field '{field}' holds half of a surrogate pair")
    return value


def _records(found: _Located) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records with the words that say where each one is."""
    if found.hub is not None:
        for number, row in enumerate(hub_records(found.hub), start=1):
            yield f"row {number}", row
    elif found.file is not None and found.plain_suffix in _TABLE_SUFFIXES:
        yield from _rows(found.file)
    elif found.file is not None:
        yield from _objects(found.file)


def _objects(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, value in json_lines(file):
        if isinstance(value, str):
            value = {TEXT_FIELDS[0]: value}
        if not isinstance(value, dict):
            raise DataError(
                f"{file} line {number} holds {type(value).__name__}, expected an object",
                f"one JSON array is not JSON lines; make it lines: jq -c '.[]' {file.name}",
            )
        yield f"line {number}", value


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    columns: list[str] = []
    for number, cells in _cells(file):
        if not columns:
            columns = cells
            if "" in columns or len(set(columns)) < len(columns):
                raise DataError(
                    f"{file}: the first line does not name its columns: {cells}", "add such a line"
                )
        elif len(cells) != len(columns):
            raise DataError(
                f"{file} line {number} has {len(cells)} columns, its first line names {len(columns)}",
                "a cell that holds what parts cells has to be quoted (.csv); or save the data as JSON lines",
            )
        else:
            yield f"line {number}", dict(zip(columns, cells, strict=True))


def _cells(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row with the line that it ends on; empty lines of a ``.csv`` are passed over."""
    if file.name.removesuffix(".gz").lower().endswith(".tsv"):
        for number, line in enumerate(lines(file), start=1):
            yield number, line.rstrip("\r\n").split("\t")
        return
    reader = csv.reader(lines(file), strict=True)
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise DataError(
            f"{file} line {reader.line_num} is no row of a table: {error}",
            "cells are parted by commas, and quoted where they hold one",
        ) from error


def _update(digest: "hashlib._Hash", text: str) -> None:
    data = text.encode("utf-8")
    digest.update(len(data).to_bytes(8, "little") + data)
