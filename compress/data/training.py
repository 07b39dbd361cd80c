"""Training tokens: windows of equal length from a text, and windows of a text that is not trained on.

Windows are cut from one stream of documents with the tokenizer's end-of-text token between them, as
calibration windows are (`compress.data.calibration`). A window may hold parts of two documents. Joined, the
second sees the first; a teacher sees the same window as its student, so that what it says of the second
document is an honest target all the same. Apart, each is read for itself (`compress.training.packing`), which
some architectures cannot be told. Nothing is padded: every token that is paid for is learned from.

A tokenizer that opens every text with a token for its beginning puts it at the start of every window, and
before each document that is kept apart: a model trained with it (Gemma) predicts badly without.

A ``.safetensors`` file with an integer tensor ``input_ids`` [windows, length] is taken as it is.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open

from compress.core.errors import DataError, UsageError
from compress.core.run import CalibrationSource, TrainingSource
from compress.data import calibration, corpora
from compress.data.builtin.splits import Split
from compress.data.bytestreams import check_readable

HELD_OUT_SHARE = 0.1
"""Of a text that has no other to be validated on: at most this share of its windows is held out."""


@dataclass(frozen=True)
class TrainingText:
    """Drawn tokens.

    Attributes:
        windows: int64 ``[windows, length]``, in random order; fewer than were asked for where the text is
            shorter.
        held_out: int64 ``[windows, length]``, never trained on.
        description: for reports.
        end: the token after which another document begins, where documents are kept apart.
    """

    windows: torch.Tensor
    held_out: torch.Tensor
    description: str
    end: int | None = None


def needs_tokenizer(source: TrainingSource) -> bool:
    """Whether any of the texts is text, and not a file of tokens."""
    return any(not text.endswith(".safetensors") for text in texts_of(source) if text is not None)


def check(source: TrainingSource) -> None:
    """Refuse before any work what can be refused from the beginning of the texts.

    Raises:
        DataError, UsageError, EnvironmentFault: missing, unreadable, empty or binary.
    """
    for text in texts_of(source):
        if text is None:
            continue
        if text.endswith(".safetensors"):
            shape_of_tokens(text)
        else:
            corpora.check(text)


def digest_of_source(source: TrainingSource) -> str:
    """What determines the tokens beside the tokenizer, the seed and the numbers: for the key of a step.

    Raises:
        DataError, UsageError, EnvironmentFault: a text is missing or cannot be read.
    """
    digests = [None if text is None else corpora.content_digest(text) for text in texts_of(source)]
    return hashlib.sha256(repr(digests).encode()).hexdigest()


def draw(
    source: TrainingSource,
    tokenizer: calibration.Tokenizer | None,
    seed: int,
    vocabulary_size: int,
    *,
    windows: int,
    held_out: int,
    length: int,
    apart: bool = False,
) -> TrainingText:
    """Draw windows to train on and windows to validate on.

    A text with more than is asked for is drawn from at random, and memory is bounded by the windows
    (about 40 bytes a token while they are drawn); a shorter one is taken as a whole.

    Args:
        source: the texts. A built-in text without a split is trained on in its training split and
            validated on in its validation split; any other text without a second one is parted.
        tokenizer: of the student; may be missing where the texts are tokens.
        seed: the same seed draws the same windows.
        vocabulary_size: rows of the student's embedding; no token may lie beyond.
        windows: how many to train on, at most.
        held_out: how many to validate on, at most.
        length: tokens in a window.
        apart: whether the documents of a window are kept apart, for which the tokenizer must be there.

    Raises:
        DataError: missing, binary, too short for one window of each kind, tokens that the model does
            not know, or a tokenizer that does not part documents.
        UsageError: numbers that make no window.
        EnvironmentFault: a text may not be read or cannot be reached.
    """
    if min(windows, held_out, length) < 1:
        raise UsageError(
            f"{windows} windows and {held_out} held out, of {length} tokens: all must be 1 or more"
        )
    end = tokenizer.eos_token_id if tokenizer is not None else None
    if apart and end is None:
        raise DataError(
            "documents cannot be kept apart without a token that ends a text, and the model folder has "
            + ("no tokenizer" if tokenizer is None else "a tokenizer without one"),
            "give the tokenizer an eos_token, or leave `documents` at joined",
        )
    training, validation = texts_of(source)
    if validation is not None:
        trained = _windows(training, tokenizer, seed, vocabulary_size, windows, length)
        judged = _windows(validation, tokenizer, seed, vocabulary_size, held_out, length)
        name = corpora.short_name(validation)
    else:
        both = _windows(training, tokenizer, seed, vocabulary_size, windows + held_out, length)
        if len(both) < 2:
            raise DataError(
                f"{training} gives one window of {length} tokens, and one has to be held out",
                "give a longer text, another one to validate on (--validation TEXT), or a shorter --window",
            )
        kept = min(held_out, max(1, int(len(both) * HELD_OUT_SHARE)))
        judged, trained = both[:kept], both[kept : kept + windows]
        name = "held out of it"
    if apart and end is not None and tokenizer is not None and needs_tokenizer(source):
        trained, judged = (_reopened(each, end, _opening(tokenizer)) for each in (trained, judged))
    return TrainingText(
        trained.contiguous(),
        judged.contiguous(),
        f"{corpora.short_name(training)}: {len(trained):,} windows of {length} tokens"
        f"{', documents apart' if apart else ''}; validation on {len(judged):,}, {name}",
        end if apart else None,
    )


def texts_of(source: TrainingSource) -> tuple[str, str | None]:
    """The texts with their splits."""
    training = corpora.in_split(source.text, Split.TRAIN)
    if source.validation is not None:
        return training, corpora.in_split(source.validation, Split.VALIDATION)
    if training != source.text:
        return training, corpora.in_split(source.text, Split.VALIDATION)
    return training, None


def _windows(
    text: str,
    tokenizer: calibration.Tokenizer | None,
    seed: int,
    vocabulary_size: int,
    count: int,
    length: int,
) -> torch.Tensor:
    """At most ``count`` windows of a text, int64 ``[windows, length]``, in an order drawn by the seed."""
    if text.endswith(".safetensors"):
        present, width = shape_of_tokens(text)
        if width != length:
            raise DataError(
                f"{text} holds windows of {width} tokens, wanted {length}", f"set --window {width}"
            )
        ready = CalibrationSource(text, min(count, present), length)
        return calibration.draw(ready, None, seed, vocabulary_size).tokens
    if tokenizer is None:
        raise DataError(
            "the model folder has no tokenizer, and training text needs one",
            "copy the tokenizer's files into it, or give tokens: a .safetensors file with 'input_ids'",
        )
    opening = _opening(tokenizer)
    body = length - len(opening)
    if body < 2:
        raise UsageError(f"a window of {length} tokens leaves no room to predict", "give a longer --window")
    if _longer_than(text, 2 * count * body * calibration.CHARACTERS_PER_TOKEN):
        source = CalibrationSource(text, count, body)
        cut = calibration.draw(source, tokenizer, seed, vocabulary_size).tokens
    else:
        cut = _whole(text, tokenizer, seed, vocabulary_size, body)[:count]
    return torch.cat([torch.tensor(opening, dtype=torch.int64).expand(len(cut), -1), cut], dim=1)


def _opening(tokenizer: calibration.Tokenizer) -> list[int]:
    """What the tokenizer itself puts before a text."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    framed = tokenizer.encode("a", add_special_tokens=True)
    starts = [at for at in range(len(framed)) if framed[at : at + len(bare)] == bare]
    return framed[: starts[0]] if starts else []


def _reopened(windows: torch.Tensor, end: int, opening: list[int]) -> torch.Tensor:
    """The windows with the opening before each document that begins inside; what then sticks out is cut."""
    if not opening:
        return windows
    length = windows.shape[1]
    rows = []
    for window in windows.tolist():
        row = window[: len(opening)]
        for token in window[len(opening) :]:
            row += [token, *opening] if token == end else [token]
        rows.append(row[:length])
    return torch.tensor(rows, dtype=torch.int64)


def _longer_than(text: str, characters: int) -> bool:
    seen = 0
    for piece in corpora.pieces(text):
        seen += len(piece.text)
        if seen > characters:
            return True
    return False


def _whole(
    text: str, tokenizer: calibration.Tokenizer, seed: int, vocabulary_size: int, length: int
) -> torch.Tensor:
    """All windows of a text, one after the other in its stream, in random order."""
    stream = torch.cat([torch.tensor(tokens, dtype=torch.int64) for tokens in _encoded(text, tokenizer)])
    count = len(stream) // length
    if count == 0:
        raise DataError(
            f"{text} gives {len(stream):,} tokens, one window needs {length}", "give a longer text"
        )
    low, high = int(stream.min()), int(stream.max())
    if low < 0 or high >= vocabulary_size:
        raise DataError(
            f"tokenizer does not fit: {text} gives token {low if low < 0 else high}, "
            f"the model's embedding has {vocabulary_size:,} rows",
            "use the tokenizer that the model was trained with",
        )
    order = torch.tensor(permutation(f"windows {seed}", count))
    return stream[: count * length].view(count, length)[order]


def _encoded(text: str, tokenizer: calibration.Tokenizer) -> Iterator[list[int]]:
    between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in corpora.documents(text).texts:
        yield [*tokenizer.encode(document, add_special_tokens=False, verbose=False), *between]


def permutation(name: str, count: int) -> list[int]:
    """The numbers below ``count`` in an order that a name determines, on every version of Python.

    Python promises that `random.Random.random` gives the same numbers for ever, and of ``shuffle`` it does
    not.
    """
    numbers = random.Random(name)
    ranks = [(numbers.random(), at) for at in range(count)]
    return [at for _, at in sorted(ranks)]


def shape_of_tokens(text: str) -> tuple[int, int]:
    """Windows and tokens in each of a file of tokens."""
    file = corpora.file_of(text)
    if file is None:
        raise DataError(f"no file of tokens at {text}")
    check_readable(file)
    try:
        with safe_open(file, framework="pt") as opened:
            if calibration.KEY not in opened.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                raise DataError(f"{file} holds no tensor '{calibration.KEY}'")
            shape = list(opened.get_slice(calibration.KEY).get_shape())
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file} is not a sound safetensors file: {error}") from error
    if len(shape) != 2 or 0 in shape:
        raise DataError(f"{file}: '{calibration.KEY}' has shape {shape}, expected [windows, length]")
    return shape[0], shape[1]
