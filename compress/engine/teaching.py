"""Caching a teacher: what it says of a text is computed once and kept in a folder, for any later run."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.core.artifact import Artifact
from compress.core.errors import EnvironmentFault, PlanError
from compress.core.events import SILENT, Reporter
from compress.core.identity import libraries
from compress.core.run import TrainingSource
from compress.core.target import Target
from compress.engine.planning import device_of
from compress.training.cache_options import CacheOptions

if TYPE_CHECKING:
    from compress.data.training import TrainingText
    from compress.training.teacher_cache import Note


@dataclass(frozen=True)
class CachedTeacher:
    """A finished cache.

    Attributes:
        path: the folder.
        tokens: of its windows, those to validate on included.
        bytes_a_token: of the whole folder.
        did_nothing: it was there already.
    """

    path: Path
    tokens: int
    bytes_a_token: float
    did_nothing: bool


def cache_teacher(
    model: str,
    source: TrainingSource,
    out: Path,
    options: CacheOptions | None = None,
    *,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
    fresh: bool = False,
    reporter: Reporter = SILENT,
) -> CachedTeacher:
    """Write what a model says of a text into a folder, taking up what an interrupted run has written.

    Args:
        model: a causal language model: a folder, a hub id or builtin:NAME.
        source: the texts, as a training will name them.
        out: the folder; a cache of something else that is there is replaced once this one is complete.
        seed: of the windows that are drawn.
        fresh: start over.

    Raises:
        CompressError: of the kind that fits; finished files are kept for the next run.
    """
    import torch

    from compress.models.preflight import examine
    from compress.models.source import resolve
    from compress.training.precision import deterministic
    from compress.training.teacher_cache import NOTE_FILE
    from compress.training.teacher_writing import bytes_a_token, predicted_bytes

    options = options or CacheOptions()
    teacher = Artifact.open(resolve(model, trust_remote_code=trust_remote_code))
    target = Target(out, NOTE_FILE)
    target.claim()
    _check(teacher, source, options)
    examine(teacher, trust_remote_code=trust_remote_code, reporter=reporter)
    threads = threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    place = torch.device(device_of(device))
    note, text = _drawn(teacher, source, options, seed, place, threads, trust_remote_code=trust_remote_code)
    done = _finished(target, note) and not fresh
    if done:
        reporter.message(f"nothing to do: {target.path} is up to date")
    else:
        needed, room = predicted_bytes(note), target.room()
        if needed > room:
            raise EnvironmentFault(
                f"the cache needs about {needed / 2**20:,.1f} MiB of disk, "
                f"{target.path.parent} has {room / 2**20:,.1f} MiB",
                "give fewer --tokens, a smaller --k, or another --out",
            )
        reporter.message(text.description)
        with target.lock(), deterministic(place):
            if target.begin(note.key, fresh=fresh) and any(map(_said, target.partial.iterdir())):
                reporter.message("taking up an interrupted caching")
            _make(target, note, text, teacher, options, place, reporter, trust_remote_code=trust_remote_code)
    tokens = (note.windows + note.held_out) * note.origin.window
    return CachedTeacher(target.path, tokens, bytes_a_token(target.path, note), done)


def _check(teacher: Artifact, source: TrainingSource, options: CacheOptions) -> None:
    """Refuse before any work what can be refused from configurations and the beginning of texts."""
    from compress.data import training
    from compress.training.teacher import check_room, check_teacher

    check_teacher(teacher)
    check_room(teacher, options.window)
    training.check(source)
    if options.tokens < options.window:
        raise PlanError(
            f"{options.tokens:,} tokens are less than one window of {options.window}", "raise --tokens"
        )


def _drawn(
    teacher: Artifact,
    source: TrainingSource,
    options: CacheOptions,
    seed: int,
    device: Any,
    threads: int,
    *,
    trust_remote_code: bool,
) -> "tuple[Note, TrainingText]":
    """The windows, and the note that the cache of them will have."""
    from compress.data import training
    from compress.models.load import skeleton, tokenizer
    from compress.numerics.buckets import MOST_TOKENS, packed_bytes
    from compress.training.precision import resolved
    from compress.training.prediction import Shape
    from compress.training.teacher_cache import Note, Origin, vocabulary_digest
    from compress.training.teacher_writing import windows_a_file

    vocabulary = Shape.of(skeleton(teacher, task="auto", trust_remote_code=trust_remote_code)).vocabulary
    if vocabulary > MOST_TOKENS:
        raise PlanError(f"a vocabulary of {vocabulary:,} tokens cannot be packed: {MOST_TOKENS:,} at most")
    words = None
    if training.needs_tokenizer(source):
        words = tokenizer(teacher, trust_remote_code=trust_remote_code)
    text = training.draw(
        source,
        words,
        seed,
        vocabulary,
        windows=options.tokens // options.window,
        held_out=max(1, options.evaluation_tokens // options.window),
        length=options.window,
    )
    origin = Origin(
        teacher=teacher.digest,
        tokenizer=None if words is None else vocabulary_digest(words),
        text=training.digest_of_source(source),
        window=options.window,
    )
    k = min(options.k, vocabulary)
    draws = options.draws if k < vocabulary else 0
    precision = resolved(options.precision, device.type)
    circumstances = {
        "origin": asdict(origin),
        "options": {**options.model_dump(mode="json"), "precision": precision},
        "seed": seed,
        "device": device.type,
        "threads": threads,
        "libraries": libraries(),
    }
    return (
        Note(
            key=_key(circumstances),
            seed=seed,
            origin=origin,
            k=k,
            draws=draws,
            vocabulary=vocabulary,
            windows=len(text.windows),
            held_out=len(text.held_out),
            file_windows=windows_a_file(options.window, packed_bytes(k, draws, vocabulary)),
            precision=precision,
            description=text.description,
        ),
        text,
    )


def _key(circumstances: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(circumstances, sort_keys=True).encode()).hexdigest()


def _said(file: Path) -> bool:
    return file.name.startswith("said-")


def _finished(target: Target, note: "Note") -> bool:
    """Whether the cache of this note is there."""
    from compress.core.errors import DataError
    from compress.training.teacher_cache import Note, TeacherCache

    if not target.path.is_dir() or not any(target.path.iterdir()):
        return False
    try:
        TeacherCache.open(target.path)
        return Note.read(target.path) == note
    except DataError:
        # What is damaged is made again.
        return False


def _make(
    target: Target,
    note: "Note",
    text: "TrainingText",
    teacher: Artifact,
    options: CacheOptions,
    device: Any,
    reporter: Reporter,
    *,
    trust_remote_code: bool,
) -> None:
    from compress.models.tasks import TextGeneration
    from compress.runtimes import Placement
    from compress.runtimes.torch_eager import load_model
    from compress.training.head import halves
    from compress.training.precision import autocast, resolved
    from compress.training.prediction import chunk_of
    from compress.training.teacher_writing import write

    arithmetic = resolved(options.precision, device.type)
    try:
        model, _ = load_model(
            teacher, TextGeneration(), Placement(device.type, arithmetic, trust_remote_code)
        )
        with autocast(arithmetic, device):
            parts = halves(model.requires_grad_(False), text.held_out[:1, :8].to(device))
        write(
            target.partial,
            note,
            text,
            parts,
            batch=options.batch,
            chunk=chunk_of(note.vocabulary, device.type),
            device=device,
            arithmetic=arithmetic,
            reporter=reporter,
        )
    except Exception as error:
        if not any(map(_said, target.partial.iterdir())):
            shutil.rmtree(target.partial)
        if isinstance(error, OSError):
            raise EnvironmentFault(
                f"teacher cache: {error.strerror or error} ({error.filename or target.partial})",
                "finished files are kept: put it right and run the same command again",
            ) from error
        raise
    target.publish()
