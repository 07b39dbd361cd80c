"""Calibration tokens: windows of equal length, drawn by a seed from a text.

Equal length means no padding, and a window without padding poisons no statistic. The procedure is the
same on every machine:

1. The documents are joined into one stream, parted by the tokenizer's end-of-text token where it has
   one (an encoder's separator where it has that instead).
2. Tokenizing costs seconds a million characters, so a long text is not tokenized as a whole: the
   stream is cut, at white space, into stretches long enough for one window, each gets a random number
   from the seed, and the stretches with the smallest numbers are tokenized, in the order of these
   numbers. One window is taken from each, at a random start; where the cut fell inside a document its
   first and last token are left out, because the cut may have changed them. Where too few stretches
   hold a whole window, it is done again with stretches twice as long.
3. A text too short for that is tokenized as a whole, and the windows get random starts without overlap.

Windows never overlap. Memory is bounded by the windows, not by the text.

Windows of a causal model hold no token for the beginning of a text: they are cut from the middle of
documents, where the model has never seen one. Windows of an encoder are what its tokenizer makes of a
text: they start with its class token and end with its separator.

A ``.safetensors`` file with an integer tensor ``input_ids`` [windows, length] is taken as it is, from
its first window on: for comparisons that must see the very same tokens.
"""

import hashlib
import heapq
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from compress.core.artifact import file_digest
from compress.core.errors import DataError, UsageError
from compress.core.run import CalibrationSource
from compress.data import corpora
from compress.data.builtin.splits import Split
from compress.data.bytestreams import check_readable

KEY = "input_ids"
CHARACTERS_PER_TOKEN = 6
"""How long a stretch is cut for each token of a window: above what vocabularies reach on prose (4 to 5)."""

_TOKENIZER_FILES = (
    "vocab*",
    "merges.txt",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text."""

    @property
    def sep_token_id(self) -> int | None:
        """The token that parts two texts of one input."""

    @property
    def cls_token_id(self) -> int | None:
        """The token that an encoder's input starts with."""

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool = ...) -> list[int]:
        """The tokens of a text."""


@dataclass(frozen=True)
class Calibration:
    """Drawn tokens.

    Attributes:
        tokens: int64 [samples, length].
        digest: SHA-256 over shape and values.
        description: for reports: source, windows, seed.
    """

    tokens: torch.Tensor
    digest: str
    description: str


@dataclass(frozen=True)
class Frame:
    """The special tokens around a window, and the one between documents."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    between: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Frame":
        """What the tokenizer itself puts around a text, when it is one of an encoder.

        An encoder is told by its input, which a class token opens and another token closes; a lone token
        for the beginning of a text, as causal models have, is no frame.
        """
        bare = tokenizer.encode("a", add_special_tokens=False)
        framed = tokenizer.encode("a", add_special_tokens=True)
        starts = [at for at in range(len(framed)) if framed[at : at + len(bare)] == bare]
        before = tuple(framed[: starts[0]]) if starts else ()
        after = tuple(framed[starts[0] + len(bare) :]) if starts else ()
        ends = [token for token in (tokenizer.eos_token_id, tokenizer.sep_token_id) if token is not None]
        if before and after and tokenizer.cls_token_id in before:
            return cls(before, after, tuple(ends[:1]))
        return cls(between=(tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ())


def draw(
    source: CalibrationSource, tokenizer: Tokenizer | None, seed: int, vocabulary_size: int
) -> Calibration:
    """Draw ``samples`` windows of ``sequence_length`` tokens.

    Args:
        source: the text and the numbers.
        tokenizer: of the model; may be missing where the source holds tokens.
        seed: the same seed draws the same windows.
        vocabulary_size: rows of the model's embedding; no token may lie beyond.

    Raises:
        DataError: missing, binary, too short, or tokens that the model does not know.
        UsageError: numbers that make no window.
        EnvironmentFault: the source may not be read or cannot be reached.
    """
    source = _for_calibration(source)
    if source.samples < 1 or source.sequence_length < 1:
        raise UsageError(
            f"calibration wants {source.samples} samples of {source.sequence_length} tokens",
            "both must be at least 1",
        )
    ready = _token_file(source)
    if ready is not None:
        tokens, name = _read_tokens(ready, source), ready.name
    elif tokenizer is None:
        raise DataError(
            "the model folder has no tokenizer, and calibration text needs one",
            f"copy the tokenizer's files into it, or give tokens: a .safetensors file with '{KEY}'",
        )
    else:
        tokens, name = _draw_text(source, tokenizer, seed), corpora.short_name(source.text)
    _check_range(tokens, vocabulary_size, source)
    drawn = "" if ready is not None else f", seed {seed}"
    return Calibration(
        tokens,
        _digest_of_tokens(tokens),
        f"{name}: {source.samples} windows of {source.sequence_length} tokens{drawn}",
    )


def digest_of_source(source: CalibrationSource, model: Path, seed: int) -> str:
    """What determines the drawn tokens and their batches, without tokenizing: for the key of a step.

    Args:
        source: the text and the numbers.
        model: the folder whose tokenizer will be used.
        seed: of the draw.

    Raises:
        DataError, UsageError, EnvironmentFault: the text is missing or cannot be read.
    """
    source = _for_calibration(source)
    digest = hashlib.sha256()
    ready = _token_file(source)
    digest.update(f"{corpora.content_digest(source.text)}\0".encode())
    numbers = (source.samples, source.sequence_length, source.batch_size, None if ready else seed)
    digest.update(repr(numbers).encode())
    if ready is None:
        files = {file for pattern in _TOKENIZER_FILES for file in model.glob(pattern) if file.is_file()}
        for file in sorted(files):
            digest.update(f"\0{file.name}\0{file_digest(file)}".encode())
    return digest.hexdigest()


def check(source: CalibrationSource) -> None:
    """Refuse before any work what can be refused from the beginning of the source.

    Raises:
        DataError, UsageError, EnvironmentFault: missing, unreadable, empty, binary, or tokens of another
            shape. Whether a text is long enough is known when it is drawn.
    """
    source = _for_calibration(source)
    ready = _token_file(source)
    if ready is None:
        corpora.check(source.text)
    else:
        _read_tokens(ready, source)


def _for_calibration(source: CalibrationSource) -> CalibrationSource:
    """The source with the split of a built-in text that is there for this."""
    return replace(source, text=corpora.in_split(source.text, Split.CALIBRATION))


def _draw_text(source: CalibrationSource, tokenizer: Tokenizer, seed: int) -> torch.Tensor:
    frame = Frame.of(tokenizer)
    length = source.sequence_length - len(frame.before) - len(frame.after)
    if length < 1:
        raise UsageError(
            f"sequence length {source.sequence_length} leaves no room between the tokenizer's special tokens",
            f"give at least {source.sequence_length - length + 1}",
        )
    width = length * CHARACTERS_PER_TOKEN
    while True:
        chosen, total = _choose(source, width, seed)
        if total < 2 * source.samples:
            windows = _from_whole(source, tokenizer, frame, length, seed)
            break
        windows = _from_stretches(chosen, source.samples, tokenizer, frame, length, seed)
        if len(windows) == source.samples:
            break
        width *= 2
    body = torch.tensor(windows, dtype=torch.int64)
    before = torch.tensor(frame.before, dtype=torch.int64).expand(len(windows), -1)
    after = torch.tensor(frame.after, dtype=torch.int64).expand(len(windows), -1)
    return torch.cat([before, body, after], dim=1).contiguous()


@dataclass(frozen=True)
class _Stretch:
    """A part of the joined stream: texts of successive documents, the outer two perhaps cut."""

    texts: tuple[str, ...]
    cut_before: bool
    cut_after: bool


def _stretches(source: str, width: int) -> Iterator[_Stretch]:
    """The stream cut into stretches of at least ``width`` characters, the last perhaps shorter.

    A cut inside a document falls before white space, so that words stay whole and keep the space that
    many vocabularies hold as part of the word; a document without white space is cut anywhere.
    """
    texts: list[str] = []
    held = ""
    size = 0
    cut_before = False
    for piece in corpora.pieces(source):
        held += piece.text
        start = 0  # a position instead of a shorter string: a chunk holds many stretches
        while size + len(held) - start >= 2 * width:
            at = _cut(held, start + max(width - size, 1), start + 2 * width - size)
            yield _Stretch((*texts, held[start:at]), cut_before, cut_after=True)
            texts, size, start, cut_before = [], 0, at, True
        held = held[start:]
        if piece.last:
            texts.append(held)
            size += len(held)
            held = ""
            if size >= width:
                yield _Stretch(tuple(texts), cut_before, cut_after=False)
                texts, size, cut_before = [], 0, False
    if texts:
        yield _Stretch(tuple(texts), cut_before, cut_after=False)


def _cut(text: str, low: int, high: int) -> int:
    """The first place in ``[low, high)`` before white space; ``low`` where there is none."""
    for at in range(low, high):
        if text[at].isspace():
            return at
    return low


def _choose(source: CalibrationSource, width: int, seed: int) -> tuple[list[_Stretch], int]:
    """A random choice of stretches in random order, and how many the text has.

    Twice as many as windows are needed are kept, because some will hold fewer tokens than a window.
    """
    numbers = random.Random(seed)
    ranked = ((numbers.random(), at, stretch) for at, stretch in enumerate(_stretches(source.text, width)))
    total = 0

    def counted() -> Iterator[tuple[float, int, _Stretch]]:
        nonlocal total
        for entry in ranked:
            total += 1
            yield entry

    # Positions are unique, so that two stretches are never compared.
    smallest = heapq.nsmallest(2 * source.samples, counted())
    return [stretch for _, _, stretch in smallest], total


def _from_stretches(
    chosen: list[_Stretch], samples: int, tokenizer: Tokenizer, frame: Frame, length: int, seed: int
) -> list[list[int]]:
    """One window from each stretch that holds one, until there are enough."""
    numbers = random.Random(f"starts {seed}")
    windows: list[list[int]] = []
    for stretch in chosen:
        tokens = _encode(stretch.texts, tokenizer, frame)
        tokens = tokens[1 if stretch.cut_before else 0 : len(tokens) - (1 if stretch.cut_after else 0)]
        spare = len(tokens) - length
        if spare >= 0:
            start = _below(numbers, spare + 1)
            windows.append(tokens[start : start + length])
        if len(windows) == samples:
            break
    return windows


def _from_whole(
    source: CalibrationSource, tokenizer: Tokenizer, frame: Frame, length: int, seed: int
) -> list[list[int]]:
    """Windows from the whole text: the spare tokens fall at random into the gaps between them."""
    texts = corpora.documents(source.text).texts
    tokens = _encode(tuple(texts), tokenizer, frame)
    needed = source.samples * length
    spare = len(tokens) - needed
    if spare < 0:
        raise DataError(_too_short(source, len(tokens), needed), _what_fits(source, len(tokens), length))
    numbers = random.Random(f"starts {seed}")
    gaps = sorted(_below(numbers, spare + 1) for _ in range(source.samples))
    windows = [tokens[gap + at * length : gap + (at + 1) * length] for at, gap in enumerate(gaps)]
    ranks = [(numbers.random(), at) for at in range(source.samples)]
    return [windows[at] for _, at in sorted(ranks)]


def _too_short(source: CalibrationSource, came: int, needed: int) -> str:
    return (
        f"{source.text} gives {came:,} tokens, {source.samples} samples of {source.sequence_length} need "
        f"{needed:,}"
    )


def _what_fits(source: CalibrationSource, came: int, length: int) -> str:
    around = source.sequence_length - length
    offers = []
    if came // length:
        offers.append(f"{came // length} samples of {source.sequence_length}")
    if came // source.samples:
        offers.append(f"{source.samples} samples of {came // source.samples + around}")
    return f"it is enough for {' or '.join(offers)}" if offers else "give a longer text"


def _encode(texts: tuple[str, ...], tokenizer: Tokenizer, frame: Frame) -> list[int]:
    encoded = [tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in texts]
    joined = list(itertools.chain.from_iterable((*tokens, *frame.between) for tokens in encoded))
    return joined[: len(joined) - len(frame.between)] if encoded else joined


def _below(numbers: random.Random, limit: int) -> int:
    """A random integer in ``[0, limit)``, from the one draw that Python promises never to change."""
    return min(int(numbers.random() * limit), limit - 1)


def _check_range(tokens: torch.Tensor, vocabulary_size: int, source: CalibrationSource) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary_size:
        wrong = low if low < 0 else high
        raise DataError(
            f"tokenizer does not fit: {source.text} gives token {wrong}, "
            f"the model's embedding has {vocabulary_size:,} rows",
            "use the tokenizer that the model was trained with",
        )


def _token_file(source: CalibrationSource) -> Path | None:
    return corpora.file_of(source.text) if source.text.endswith(".safetensors") else None


def _read_tokens(file: Path, source: CalibrationSource) -> torch.Tensor:
    """The first windows of a file of tokens: int64 [samples, sequence_length]."""
    check_readable(file)
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            if KEY not in names:
                raise DataError(
                    f"{file} holds no tensor '{KEY}'", f"it holds: {', '.join(sorted(names)) or 'nothing'}"
                )
            rows = opened.get_slice(KEY)
            shape = list(rows.get_shape())
            if len(shape) != 2:
                raise DataError(f"{file}: '{KEY}' has shape {shape}, expected [windows, length]")
            if shape[0] < source.samples or shape[1] != source.sequence_length:
                raise DataError(
                    f"{file} holds {shape[0]} windows of {shape[1]} tokens, "
                    f"wanted {source.samples} of {source.sequence_length}",
                    f"ask for at most {shape[0]} samples and a sequence length of {shape[1]}",
                )
            tokens: torch.Tensor = rows[: source.samples]
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file} is not a sound safetensors file: {error}") from error
    if tokens.dtype not in _INTEGERS:
        raise DataError(f"{file}: '{KEY}' is {tokens.dtype}, expected integers")
    return tokens.to(torch.int64).contiguous()


def _digest_of_tokens(tokens: torch.Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    digest.update(tokens.numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()
