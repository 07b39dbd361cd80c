"""Bytes of a text file to characters, in bounded memory, with errors that say at which byte.

A text that holds a NUL byte or is not UTF-8 is refused: reading on with replacement characters would
calibrate a model on noise.
"""

import codecs
import difflib
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.core.errors import DataError, EnvironmentFault

CHUNK_BYTES = 1 << 20


def characters(file: Path) -> Iterator[str]:
    """The characters of a UTF-8 file, plain or ``.gz``, in chunks; a byte order mark is left out.

    Raises:
        DataError: missing, not a file, empty, binary, or damaged gzip.
        EnvironmentFault: it may not be read.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    where = " when unpacked" if _packed(file) else ""
    offset = 0
    for chunk in _chunks(file):
        pending = len(decoder.getstate()[0])
        zero = chunk.find(b"\0")
        if zero >= 0:
            raise DataError(
                f"{file} is not a text: it holds a NUL byte at {offset + zero:,}{where}",
                "give a UTF-8 text file, JSON lines or a hub data set",
            )
        text = _decoded(decoder, chunk, file, offset - pending, where)
        if offset == 0:
            text = text.removeprefix("\ufeff")
        offset += len(chunk)
        if text:
            yield text
    _decoded(decoder, b"", file, offset - len(decoder.getstate()[0]), where, final=True)
    if offset == 0:
        raise DataError(f"{file} is empty", "is the download complete?")


def lines(file: Path) -> Iterator[str]:
    """The lines of a file, line ends included; memory is bounded by the longest line.

    Only a line feed ends a line: JSON strings may hold the other separators that Unicode knows.

    Raises:
        DataError, EnvironmentFault: as `characters`.
    """
    parts: list[str] = []
    for chunk in characters(file):
        first, *others = chunk.split("\n")
        parts.append(first)
        for other in others:
            yield "".join(parts) + "\n"
            parts = [other]
    if any(parts):
        yield "".join(parts)


def check_readable(file: Path) -> None:
    """Refuse a file that is missing, is none, or may not be read; its contents are not looked at.

    Raises:
        DataError, EnvironmentFault: as `characters`.
    """
    with _reading(file), _regular(file).open("rb"):
        pass


def near_names(path: Path) -> str:
    """A hint that names files with a similar name beside a missing one, or nothing."""
    try:
        names = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        return f"there is no folder {path.parent}" if not path.parent.is_dir() else ""
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""


def _decoded(
    decoder: codecs.IncrementalDecoder,
    chunk: bytes,
    file: Path,
    start: int,
    where: str,
    *,
    final: bool = False,
) -> str:
    try:
        return decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8: {error.reason} at byte {start + error.start:,}{where}",
            "if it is a text in another encoding, convert it: iconv -f ENCODING -t UTF-8",
        ) from error


def _packed(file: Path) -> bool:
    return file.suffix.lower() == ".gz"


def _chunks(file: Path) -> Iterator[bytes]:
    with _reading(file):
        _regular(file)
        with gzip.open(file, "rb") if _packed(file) else file.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """What the operating system and gzip say, in the words of our own errors."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"no text at {file}", near_names(file)) from error
    except PermissionError as error:
        raise EnvironmentFault(f"no permission to read {file}", "change its permissions") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{file} is damaged gzip: {error}", "is the download complete? gzip --test says more"
        ) from error
    except OSError as error:
        raise EnvironmentFault(f"{file} cannot be read: {error.strerror or error}") from error


def _regular(file: Path) -> Path:
    if file.is_dir():
        raise DataError(f"{file} is a folder, expected a text file", "name a file in it")
    if file.exists() and not file.is_file():
        raise DataError(
            f"{file} is a pipe or a device, expected a text file",
            "a text is read more than once: save it to a file",
        )
    return file


def json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """The values of a file of JSON lines with their line numbers, from 1; empty lines are passed over.

    Raises:
        DataError: a line is not JSON.
    """
    for number, line in enumerate(lines(file), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            hint = "one JSON object a line is expected"
            if number == 1 and line.lstrip().startswith("["):
                hint = f"this is one JSON array; make it lines: jq -c '.[]' {file.name}"
            raise DataError(f"{file} line {number} is not JSON: {error}", hint) from error
