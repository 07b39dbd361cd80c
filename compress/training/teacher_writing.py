"""Writing what a teacher says of a text (`compress.training.teacher_cache`), file by file.

A file appears under its name when it is complete, and what is there is not computed again: a caching that was
killed goes on after its last file.
"""

import hashlib
from pathlib import Path
from typing import Final

import torch

from compress.core.events import Reporter
from compress.data.training import TrainingText
from compress.formats.shards import write_shard
from compress.numerics.buckets import buckets, pack, packed_bytes, packed_layout
from compress.training.head import Halves
from compress.training.precision import Arithmetic, autocast
from compress.training.teacher_cache import WINDOWS, WINDOWS_FILE, Note

_FILE_BYTES: Final = 2**25
"""Of one file, about: what a caching that was killed computes again at most."""


def windows_a_file(window: int, position_bytes: int) -> int:
    """How many windows go into one file.

    Args:
        window: tokens in a window.
        position_bytes: what a packed position takes.
    """
    return max(1, _FILE_BYTES // ((window - 1) * position_bytes))


def bytes_a_token(folder: Path, note: Note) -> float:
    """Bytes of a finished cache for each token of its windows, all of its files counted."""
    written = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return written / ((note.windows + note.held_out) * note.origin.window)


def predicted_bytes(note: Note) -> int:
    """What a cache will take on disk."""
    window = note.origin.window
    position = packed_bytes(note.k, note.draws, note.vocabulary)
    return (note.windows + note.held_out) * ((window - 1) * position + 4 * window)


def write(
    folder: Path,
    note: Note,
    text: TrainingText,
    teacher: Halves,
    *,
    batch: int,
    chunk: int,
    device: torch.device,
    arithmetic: Arithmetic,
    reporter: Reporter,
) -> None:
    """Write what is not there yet; the note comes last.

    Args:
        folder: may hold some of the files of the same note.
        text: the windows.
        batch: windows in one forward pass.
        chunk: positions whose logits are computed at once.

    Raises:
        OSError: the disk is full, or may not be written.
    """
    rows = torch.cat([text.held_out, text.windows])
    layout = {WINDOWS: (torch.int32, tuple(rows.shape))}
    write_shard(folder / WINDOWS_FILE, layout, lambda _: rows.to(torch.int32), lambda _: None)
    with reporter.progress("caching", rows.numel(), "token") as advance:
        for name, part in zip(note.files, rows.split(note.file_windows), strict=True):
            if not (folder / name).is_file():
                reporter.event("teacher.write", file=name)
                packed: dict[str, list[torch.Tensor]] = {}
                # Whichever file is written first, its draws are the same.
                generator = torch.Generator(device).manual_seed(_seed(note, name))
                for some in part.split(batch):
                    said = _said(teacher, some.to(device), note, chunk, arithmetic, generator)
                    for key, value in said.items():
                        packed.setdefault(key, []).append(value)
                    advance(some.numel())
                _write_file(folder / name, packed, note, len(part))
                reporter.event("teacher.finish", file=name)
            else:
                advance(part.numel())
    note.write(folder)


def _write_file(file: Path, packed: dict[str, list[torch.Tensor]], note: Note, count: int) -> None:
    shapes = packed_layout(note.k, note.draws, note.vocabulary)
    layout = {key: (dtype, (count, note.origin.window - 1, *shape)) for key, (dtype, shape) in shapes.items()}
    write_shard(file, layout, lambda key: torch.cat(packed[key]), lambda _: None)


@torch.no_grad()
def _said(
    teacher: Halves,
    windows: torch.Tensor,
    note: Note,
    chunk: int,
    arithmetic: Arithmetic,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """What the teacher says after each token but the last, packed, ``[batch, length - 1, ...]``."""
    with autocast(arithmetic, windows.device):
        states = teacher.states(windows)[:, :-1].flatten(0, 1)
        parts = [
            pack(buckets(teacher.logits(some), note.k, note.draws, generator), note.vocabulary)
            for some in states.split(chunk)
        ]
    count = len(windows)
    return {key: torch.cat([part[key] for part in parts]).unflatten(0, (count, -1)) for key in parts[0]}


def _seed(note: Note, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{name} of seed {note.seed}".encode()).digest()[:7], "little")
