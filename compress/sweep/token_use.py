"""Which tokens a text uses, which of them stay, and whether the text has the same pieces afterwards."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer

from compress.core.errors import DataError, VerificationError
from compress.models.pieces import TokenizerDocument

_TOGETHER: Final = 2**22
"""Characters that are split in one call, which the library spreads over the cores."""
PROBES: Final = (
    "The quick brown fox, 1234 - naïve 漢字 🙂\n\tdef f(x): return x",
    "Ελληνικά, русский, العربية, हिन्दी, ไทย, 한국어; \u200d\ufeff ½ \x07",
)
"""Texts of many scripts, most of which a corpus never uses."""


@dataclass(frozen=True)
class Use:
    """How often tokens occur in a text.

    Attributes:
        counts: by number of the token, those alone that occur.
        characters: of the text.
    """

    counts: Mapping[int, int]
    characters: int

    @property
    def tokens(self) -> int:
        """Of the whole text."""
        return sum(self.counts.values())

    def write(self, file: Path) -> None:
        """Write it, complete or not at all."""
        partial = file.with_suffix(".partial")
        document = {"characters": self.characters, "counts": sorted(self.counts.items())}
        partial.write_text(json.dumps(document), encoding="utf-8")
        partial.replace(file)

    @classmethod
    def read(cls, file: Path) -> "Use | None":
        """What an earlier run counted, or ``None``."""
        if not file.is_file():
            return None
        document = json.loads(file.read_text(encoding="utf-8"))
        return cls(dict(document["counts"]), document["characters"])


@dataclass(frozen=True)
class Choice:
    """The tokens that stay.

    Attributes:
        kept: their numbers, rising, and behind them rows without a token that a configuration names; the new
            number of a token is its place here.
        used: how many of them the text uses often enough.
        lasting: how many more stay whatever the text uses: bytes, special tokens, what configurations name.
        within: how many more stay because others are made of them.
        filled: how many more fill the number up to a multiple.
    """

    kept: tuple[int, ...]
    used: int
    lasting: int
    within: int
    filled: int

    @property
    def new(self) -> dict[int, int]:
        """New numbers by old ones."""
        return {number: place for place, number in enumerate(self.kept)}


def plain(text: str) -> Tokenizer:
    """A tokenizer of the library from its document, which neither cuts nor pads what it splits."""
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def split(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[tuple[list[str], list[list[int]]]]:
    """Texts with the numbers of their tokens, many at a time; nothing is put around a text."""
    for batch in _batches(texts):
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        yield batch, [encoding.ids for encoding in encodings]


def count(tokenizer: Tokenizer, texts: Iterable[str]) -> Use:
    """How often each token occurs in texts.

    Raises:
        DataError: the texts hold no token.
    """
    totals = torch.zeros(0, dtype=torch.int64)
    characters = 0
    for batch, numbers in split(tokenizer, texts):
        characters += sum(map(len, batch))
        flat = torch.tensor([number for entry in numbers for number in entry], dtype=torch.int64)
        found = torch.bincount(flat, minlength=len(totals))
        found[: len(totals)] += totals
        totals = found
    counts = {number: int(times) for number, times in enumerate(totals.tolist()) if times}
    if not counts:
        raise DataError("the text holds no token, so it says nothing of a vocabulary", "give another text")
    return Use(counts, characters)


def choose(
    document: TokenizerDocument,
    use: Use,
    named: Collection[int],
    rows: int,
    *,
    least: int = 1,
    multiple: int = 1,
) -> Choice:
    """The tokens that stay.

    The number is filled up to a multiple with tokens that could have gone, the lowest numbers first, and not
    with empty rows: a row that no training has seen says nothing and can still be the likeliest.

    Args:
        named: tokens that configurations name.
        rows: of the embedding; a row without a token may be named, and is the last to fill up with.
        least: how often a token has to occur.
        multiple: of what the number of tokens that stay has to be.

    Raises:
        DataError: nothing would go.
    """
    used = {number for number, times in use.counts.items() if times >= least}
    lasting = used | document.lasting() | {number for number in named if number < rows}
    needed = document.closed(lasting)
    wanted = -(-len(needed) // multiple) * multiple
    if wanted >= rows:
        raise DataError(
            f"the text uses {len(used):,} of {rows:,} tokens and {len(needed):,} have to stay, "
            f"which in multiples of {multiple} is {wanted:,}: nothing would go",
            "give the text that the model will see and no more, a smaller --multiple, or a larger --least",
        )
    kept = set(needed)
    tokens = set(document.numbers.values())
    while len(kept) < wanted:
        # The shortest piece that is not there is made of pieces that are, so that each round finds one.
        for number in range(rows):
            if number not in kept:
                more = document.closed([number]) - kept
                if len(kept) + len(more) <= wanted:
                    kept |= more
            if len(kept) == wanted:
                break
    return Choice(
        tuple(sorted(kept, key=lambda number: (number not in tokens, number))),
        len(used),
        len(lasting) - len(used),
        len(needed) - len(lasting),
        len(kept) - len(needed),
    )


def prove(
    before: Tokenizer, after: Tokenizer, choice: Choice, texts: Iterable[str], *, lossless: bool
) -> int:
    """Hold the smaller tokenizer against the larger one: on the text, and on texts of other scripts.

    Args:
        texts: that the choice was made by.
        lossless: whether the text has to have the same pieces.

    Returns:
        how many tokens the text has now.

    Raises:
        VerificationError: the text has other pieces, or a text that could be read back no longer can.
    """
    places = torch.full((max(choice.kept) + 1,), -1, dtype=torch.int64)
    places[list(choice.kept)] = torch.arange(len(choice.kept))
    total = 0
    for batch, numbers in split(after, texts):
        total += sum(map(len, numbers))
        if not lossless:
            continue
        old = [encoding.ids for encoding in before.encode_batch_fast(batch, add_special_tokens=False)]
        for text, was, now in zip(batch, old, numbers, strict=True):
            if places[torch.tensor(was, dtype=torch.int64)].tolist() != now:
                raise VerificationError(_first_difference(before, after, text, was, now), _HINT)
    for probe in PROBES:
        if _read_back(before, probe) == probe and (came := _read_back(after, probe)) != probe:
            raise VerificationError(f"{probe!r} reads back as {came!r}, and did as itself", _HINT)
    return total


_HINT: Final = "report it together with the tokenizer.json of the model"


def _read_back(tokenizer: Tokenizer, text: str) -> str:
    numbers = tokenizer.encode(text, add_special_tokens=False).ids
    return str(tokenizer.decode(numbers, skip_special_tokens=False))


def _first_difference(before: Tokenizer, after: Tokenizer, text: str, was: list[int], now: list[int]) -> str:
    """Where a text has other pieces, in words."""
    old = [before.id_to_token(number) for number in was]
    new = [after.id_to_token(number) for number in now]
    same = 0
    for one, other in zip(old, new, strict=False):
        if one != other:
            break
        same += 1
    return (
        f"{text[:40]!r}... has other pieces than before from piece {same} on: "
        f"{new[same : same + 4]}, before {old[same : same + 4]}"
    )


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _TOGETHER:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
