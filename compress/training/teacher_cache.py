"""What a teacher says of a text, in a folder: written once, and learned from by any later run.

The folder holds

- ``teacher.json``: of which teacher, tokenizer, text and window it is, and its sizes (`Note`);
- ``windows.safetensors``: ``windows`` ``[held out + trained on, length]``, in the order in which they were
  drawn;
- ``said-NNNNN.safetensors``: for a number of windows each, in that order, what the teacher says after each
  token but the last: its k most likely tokens, the tail, and tokens drawn from it, with their
  log-probabilities, packed (`compress.numerics.buckets`).

A run takes its windows from here, so that tokens, batches and epochs may be others than those of the run
before it. It is refused where teacher, tokenizer, text or window are not those that the cache was made with.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors import SafetensorError, safe_open

from compress.core.errors import DataError
from compress.data.training import TrainingText
from compress.numerics.buckets import packed_layout, unpack
from compress.training.imitation import Distribution, Teacher

NOTE_FILE: Final = "teacher.json"
WINDOWS_FILE: Final = "windows.safetensors"
WINDOWS: Final = "windows"
_VERSION: Final = 1
_AGAIN: Final = "make it again: compress teacher cache TEACHER --text TEXT --window N --out FOLDER"
_STALE: Final = f"{_AGAIN}; or leave --cache out, and the teacher is run"


@dataclass(frozen=True)
class Origin:
    """What a cache is of.

    Attributes:
        teacher: digest of the model.
        tokenizer: digest of what it does, or none where the text is a file of tokens.
        text: digest of training and validation text.
        window: tokens in a window.
    """

    teacher: str
    tokenizer: str | None
    text: str
    window: int


@dataclass(frozen=True)
class Note:
    """What a cache holds.

    Attributes:
        key: of all that determines its bytes.
        seed: of the draws.
        k: most likely tokens kept of each position.
        draws: tokens drawn from the others.
        vocabulary: logits that a position had.
        windows: to train on.
        held_out: windows to validate on; they come first.
        file_windows: windows in each file but the last.
        precision: arithmetic of the teacher's passes.
        description: of the text, for reports.
    """

    key: str
    seed: int
    origin: Origin
    k: int
    draws: int
    vocabulary: int
    windows: int
    held_out: int
    file_windows: int
    precision: str
    description: str

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files with what the teacher says."""
        count = -(-(self.windows + self.held_out) // self.file_windows)
        return tuple(f"said-{number:05d}.safetensors" for number in range(count))

    def write(self, folder: Path) -> None:
        """Write ``teacher.json``."""
        text = json.dumps({"version": _VERSION, **asdict(self)}, indent=1, sort_keys=True)
        (folder / NOTE_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Note":
        """The note of a folder.

        Raises:
            DataError: it is no cache, or one of another version.
        """
        file = folder / NOTE_FILE
        if not file.is_file():
            raise DataError(f"{folder} is no cached teacher: it has no {NOTE_FILE}", _AGAIN)
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            version = document.pop("version")
            if version != _VERSION:
                raise DataError(f"{file} has version {version}, expected {_VERSION}", _AGAIN)
            return cls(**{**document, "origin": Origin(**document["origin"])})
        except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise DataError(f"{file} is damaged: {error}", _AGAIN) from error


def vocabulary_digest(tokenizer: Any) -> str:
    """SHA-256 of how a tokenizer makes tokens of text, whatever the files that it came from.

    Args:
        tokenizer: of transformers. Of a fast one the whole pipeline counts, of another one its vocabulary.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    document: dict[str, Any] = {"end": tokenizer.eos_token_id, "words": tokenizer.get_vocab()}
    if backend is not None:
        # How inputs are cut and filled up is the caller's, and may have been changed by one.
        passing = ("truncation", "padding")
        pipeline = json.loads(backend.to_str())
        document["pipeline"] = {name: part for name, part in pipeline.items() if name not in passing}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@final
class TeacherCache(Teacher):
    """A teacher that is looked up instead of run.

    Args:
        folder: written by `compress.training.teacher_writing`.
        note: what it holds.
    """

    def __init__(self, folder: Path, note: Note) -> None:
        self._folder = folder
        self._note = note
        self._rows: dict[bytes, int] = {}
        self._opened: dict[str, Any] = {}

    @classmethod
    def open(cls, folder: Path) -> "TeacherCache":
        """The cache in a folder, of which only the note is read.

        Raises:
            DataError: it is no cache, incomplete, or of another version.
        """
        note = Note.read(folder)
        absent = [name for name in (WINDOWS_FILE, *note.files) if not (folder / name).is_file()]
        if absent:
            raise DataError(f"the cached teacher {folder} lacks {absent[0]}", _AGAIN)
        return cls(folder, note)

    @property
    def facts(self) -> Mapping[str, Any]:
        """What of it belongs into the record of a training."""
        note = self._note
        return {"k": note.k, "draws": note.draws, "precision": note.precision, "windows": note.windows}

    def check(self, expected: Origin) -> None:
        """Refuse a cache of something else.

        Raises:
            DataError: saying what differs.
        """
        found, wanted = asdict(self._note.origin), asdict(expected)
        differing = [name for name in wanted if found[name] != wanted[name]]
        if differing:
            told = "; ".join(
                f"{name} {found[name]!s:.12} instead of {wanted[name]!s:.12}" for name in differing
            )
            raise DataError(f"the cached teacher {self._folder} is of something else: {told}", _STALE)

    def text(self, windows: int, held_out: int) -> TrainingText:
        """The first of its windows, in the order in which they were drawn.

        Args:
            windows: how many to train on, at most.
            held_out: how many to validate on, at most.

        Raises:
            DataError: the file is damaged.
        """
        note = self._note
        tokens = self._tensor(WINDOWS_FILE, WINDOWS).to(torch.int64)
        if tokens.shape != (note.held_out + note.windows, note.origin.window):
            raise DataError(f"{self._folder / WINDOWS_FILE} is damaged: {list(tokens.shape)} tokens", _AGAIN)
        self._rows = {_name(row): at for at, row in enumerate(tokens)}
        judged = tokens[: min(held_out, note.held_out)]
        trained = tokens[note.held_out : note.held_out + min(windows, note.windows)]
        return TrainingText(trained, judged, f"{note.description}, as cached; {len(trained):,} are used")

    def lesson(self, windows: torch.Tensor) -> Callable[[torch.Tensor], Distribution]:
        """See `Teacher.lesson`; the windows must be some of `text`."""
        found = [self._row(self._rows[_name(row)]) for row in windows.cpu()]
        # What is stored is in half precision, which an autocast to bfloat16 would not join.
        with torch.autocast("cpu", enabled=False):
            buckets = unpack({name: torch.cat([row[name] for row in found]) for name in found[0]})
        there = buckets.to(windows.device)
        return there.rows

    def _row(self, row: int) -> dict[str, torch.Tensor]:
        number, place = divmod(row, self._note.file_windows)
        name = self._note.files[number]
        layout = packed_layout(self._note.k, self._note.draws, self._note.vocabulary)
        return {key: self._tensor(name, key, place) for key in layout}

    def _tensor(self, file: str, key: str, row: int | None = None) -> torch.Tensor:
        """A tensor of a file, or one row of it, read when it is asked for."""
        try:
            if file not in self._opened:
                # Kept open: a handle is a map of the file, and nothing is read before it is asked for.
                self._opened[file] = safe_open(self._folder / file, framework="pt")
            opened = self._opened[file]
            found: torch.Tensor = opened.get_tensor(key) if row is None else opened.get_slice(key)[row]
        except (SafetensorError, OSError) as error:
            raise DataError(f"{self._folder / file} is damaged: {error}", _AGAIN) from error
        return found


def _name(row: torch.Tensor) -> bytes:
    """What a window is known by."""
    return hashlib.blake2b(row.numpy().tobytes(), digest_size=16).digest()
