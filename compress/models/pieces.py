"""The pieces that a tokenizer has, which of them depend on others, and the tokenizer with fewer of them.

A tokenizer is taken apart as the document that the tokenizers library writes (``tokenizer.json``). Its pieces
can be taken out where they fall back on smaller ones. What has to stay, so that a text whose pieces all stay
is split as before, depends on the kind:

- pairs put together (BPE; Sennrich et al. 2016, arXiv 1508.07909). A text is split as before when every piece
  that it passes through stays, not only those in which it ends. The way to a piece is the same wherever the
  piece occurs, because no pair across its ends was put together; so what has to stay with a piece are the two
  pieces of which its last step was made, theirs, and so on down to single characters. Where several pairs
  make one piece (as in conversions from SentencePiece), the steps are made once more to see which pair does;
- longest piece first (WordPiece). A longer piece is never there where it was not before, so nothing else
  has to stay;
- the likeliest split (Unigram; Kudo 2018, arXiv 1804.10959). The best of all splits stays the best of fewer.
  The least likely piece stays too, because the library derives from it what an unknown character costs.

Any other text has to stay readable as well: the bytes stay that a tokenizer falls back on, or else its single
characters; and with them the unknown piece, the character that stands for a space, everything that was added
to the model's own pieces, such as special tokens, and what the library puts around a text.
"""

import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Final, final

from compress.core.errors import PlanError

_BYTE: Final = re.compile(r"^<0x[0-9A-Fa-f]{2}>$")


class Pieces(ABC):
    """The pieces of a tokenizer's model.

    Attributes:
        numbers: of each piece by its text.
    """

    numbers: Mapping[str, int]

    @abstractmethod
    def lasting(self) -> set[int]:
        """The pieces that stay whatever a text uses, so that any text can be split."""

    @abstractmethod
    def within(self, piece: str) -> Iterable[str]:
        """The pieces that have to stay where this one stays: those of which it is made."""

    @abstractmethod
    def restricted(self, new: Mapping[int, int]) -> dict[str, Any]:
        """The model of the document with those pieces alone that have a new number.

        Args:
            new: new numbers by old ones, in the same order.
        """


@final
class Pairs(Pieces):
    """Pairs that are put together in order of their rank."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self._model = model
        self.numbers = model["vocab"]
        self._prefix: str = model.get("continuing_subword_prefix") or ""
        self._suffix: str = model.get("end_of_word_suffix") or ""
        merges = [
            tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]
        ]
        self._merges: list[tuple[str, str]] = [(left, right) for left, right in merges]
        # Of a pair that is listed twice the library keeps the later rank.
        self._ranks = {pair: rank for rank, pair in enumerate(self._merges)}
        self._making: dict[str, list[tuple[str, str]]] = {}
        for pair in self._ranks:
            self._making.setdefault(self._made(pair), []).append(pair)

    def _made(self, pair: tuple[str, str]) -> str:
        return pair[0] + pair[1].removeprefix(self._prefix)

    def lasting(self) -> set[int]:
        """Bytes to fall back on, or single characters; in a byte-level vocabulary these are the bytes."""
        staying: set[str | None] = {self._model.get("unk_token")}
        if self._model.get("byte_fallback"):
            staying |= {piece for piece in self.numbers if _BYTE.match(piece)}
        else:
            for piece in self.numbers:
                bare = piece.removeprefix(self._prefix) or piece
                if len(bare.removesuffix(self._suffix) or bare) == 1:
                    staying.add(piece)
        return {number for piece, number in self.numbers.items() if piece in staying}

    def within(self, piece: str) -> Iterable[str]:
        """The two pieces of the last step, or those of every pair that makes it where that cannot be told."""
        pairs = self._making.get(piece, [])
        if len(pairs) > 1 and not self._prefix and not self._suffix:
            last = self._last_step(piece)
            pairs = pairs if last is None else [last]
        return itertools.chain.from_iterable(pairs)

    def _last_step(self, piece: str) -> tuple[str, str] | None:
        """The pair put together last when the piece is split by itself; none where that ends elsewhere."""
        symbols, last = list(piece), None
        while len(symbols) > 1:
            pairs = list(itertools.pairwise(symbols))
            ranked = [(self._ranks[pair], place) for place, pair in enumerate(pairs) if pair in self._ranks]
            if not ranked:
                return None
            _, place = min(ranked)
            last = pairs[place]
            symbols[place : place + 2] = ["".join(last)]
        return last

    def restricted(self, new: Mapping[int, int]) -> dict[str, Any]:
        """Pieces with new numbers, and every pair of which both parts and the result stay."""
        vocabulary = {piece: new[number] for piece, number in self.numbers.items() if number in new}
        merges = [list(pair) for pair in self._merges if {*pair, self._made(pair)} <= vocabulary.keys()]
        return {**self._model, "vocab": _ordered(vocabulary), "merges": merges}


@final
class LongestFirst(Pieces):
    """Words split into the longest pieces from the left."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self._model = model
        self.numbers = model["vocab"]
        self._prefix: str = model.get("continuing_subword_prefix") or ""

    def lasting(self) -> set[int]:
        """The unknown piece and single characters, at the beginning of a word and within."""
        unknown = self._model.get("unk_token")
        return {
            number
            for piece, number in self.numbers.items()
            if piece == unknown or len(piece.removeprefix(self._prefix) or piece) == 1
        }

    def within(self, piece: str) -> Iterable[str]:
        """Nothing."""
        return ()

    def restricted(self, new: Mapping[int, int]) -> dict[str, Any]:
        """Pieces with new numbers."""
        vocabulary = {piece: new[number] for piece, number in self.numbers.items() if number in new}
        return {**self._model, "vocab": _ordered(vocabulary)}


@final
class Likeliest(Pieces):
    """Pieces with scores, of which the likeliest sequence is taken; a piece's number is its place."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self._model = model
        self._entries: list[tuple[str, float]] = [(piece, score) for piece, score in model["vocab"]]
        # Of a piece that is listed twice the library finds the later place.
        self.numbers = {piece: place for place, (piece, _) in enumerate(self._entries)}

    def lasting(self) -> set[int]:
        """The unknown piece, the least likely one, and bytes to fall back on or else single characters."""
        staying = {min(range(len(self._entries)), key=lambda place: self._entries[place][1])}
        if self._model.get("unk_id") is not None:
            staying.add(self._model["unk_id"])
        bytes_to_fall_back_on = bool(self._model.get("byte_fallback"))
        for place, (piece, _) in enumerate(self._entries):
            if _BYTE.match(piece) if bytes_to_fall_back_on else len(piece) == 1:
                staying.add(place)
        return staying

    def within(self, piece: str) -> Iterable[str]:
        """Nothing."""
        return ()

    def restricted(self, new: Mapping[int, int]) -> dict[str, Any]:
        """Pieces in their old order with their old scores."""
        entries = [list(entry) for place, entry in enumerate(self._entries) if place in new]
        unknown = self._model.get("unk_id")
        return {**self._model, "vocab": entries, "unk_id": None if unknown is None else new[unknown]}


_KINDS: Final[Mapping[str, type[Pairs] | type[LongestFirst] | type[Likeliest]]] = {
    "BPE": Pairs,
    "WordPiece": LongestFirst,
    "Unigram": Likeliest,
}


@final
class TokenizerDocument:
    """What the tokenizers library writes of a tokenizer.

    Attributes:
        pieces: of its model.
        added: numbers of what was added to them, by their texts; some are pieces of the model as well.

    Args:
        text: JSON.
        where: the tokenizer's name in error messages.

    Raises:
        PlanError: a kind of model whose pieces cannot be taken out.
    """

    def __init__(self, text: str, where: str) -> None:
        self._document: dict[str, Any] = json.loads(text)
        model = self._document["model"]
        kind = _KINDS.get(model.get("type"))
        if kind is None:
            raise PlanError(
                f"{where} is of the kind {model.get('type')}, whose pieces fall back on nothing smaller",
                f"vocabularies of the kinds {', '.join(_KINDS)} can be pruned",
            )
        for option in ("dropout", "alpha"):
            if model.get(option):
                raise PlanError(
                    f"{where} splits texts at random ({option} {model[option]}), so none has fixed pieces",
                    f"set model.{option} in tokenizer.json to null",
                )
        self.pieces = kind(model)
        self._texts = {number: piece for piece, number in self.pieces.numbers.items()}
        self.added: Mapping[str, int] = {
            entry["content"]: entry["id"] for entry in self._document.get("added_tokens") or []
        }

    @property
    def numbers(self) -> dict[str, int]:
        """The number of every token by its text: pieces of the model, and what was added."""
        return {**self.pieces.numbers, **self.added}

    def lasting(self) -> set[int]:
        """The tokens that stay whatever a text uses."""
        around = set(_numbers_around(self._document.get("post_processor")))
        padding = self._document.get("padding")
        if padding is not None:
            around.add(padding["pad_id"])
        stand_ins = set(_stand_ins(self._document.get("decoder"))) & self.pieces.numbers.keys()
        around |= {self.pieces.numbers[piece] for piece in stand_ins}
        return self.pieces.lasting() | set(self.added.values()) | around

    def closed(self, numbers: Collection[int]) -> set[int]:
        """Tokens with everything of which they are made.

        Args:
            numbers: of tokens; one that is no piece of the model is made of nothing.
        """
        found: set[int] = set()
        waiting = list(numbers)
        while waiting:
            number = waiting.pop()
            if number in found:
                continue
            found.add(number)
            if number in self._texts:
                parts = self.pieces.within(self._texts[number])
                waiting += [self.pieces.numbers[part] for part in parts if part in self.pieces.numbers]
        return found

    def restricted(self, new: Mapping[int, int]) -> dict[str, Any]:
        """The document of the tokenizer that has those tokens alone which have a new number.

        Args:
            new: new numbers by old ones, in the same order; `lasting` tokens are among them.
        """
        document = {**self._document, "model": self.pieces.restricted(new)}
        document["added_tokens"] = [
            {**entry, "id": new[entry["id"]]} for entry in self._document.get("added_tokens") or []
        ]
        document["post_processor"] = _renumbered(self._document.get("post_processor"), new)
        padding = self._document.get("padding")
        if padding is not None:
            document["padding"] = {**padding, "pad_id": new[padding["pad_id"]]}
        return document


def _ordered(vocabulary: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(vocabulary.items(), key=lambda entry: entry[1]))


def _stand_ins(decoder: Mapping[str, Any] | None) -> Iterator[str]:
    """What the decoder writes as something else, such as the character for a space.

    It does so in pieces alone: put together from bytes the character would come back as itself.
    """
    if decoder is None:
        return
    if decoder["type"] == "Metaspace":
        yield decoder["replacement"]
    elif decoder["type"] == "Replace" and "String" in decoder["pattern"]:
        yield decoder["pattern"]["String"]
    for inner in decoder.get("decoders") or []:
        yield from _stand_ins(inner)


def _numbers_around(processor: Mapping[str, Any] | None) -> Iterator[int]:
    """The tokens that a post-processor puts around a text, by their numbers."""
    if processor is None:
        return
    for entry in (processor.get("special_tokens") or {}).values():
        yield from entry["ids"]
    for end in ("sep", "cls"):
        if end in processor:
            yield processor[end][1]
    for inner in processor.get("processors") or []:
        yield from _numbers_around(inner)


def _renumbered(processor: Mapping[str, Any] | None, new: Mapping[int, int]) -> dict[str, Any] | None:
    """A post-processor with new numbers: templates, BERT's and RoBERTa's, and sequences of them."""
    if processor is None:
        return None
    changed = dict(processor)
    if changed.get("special_tokens"):
        changed["special_tokens"] = {
            name: {**entry, "ids": [new[number] for number in entry["ids"]]}
            for name, entry in changed["special_tokens"].items()
        }
    for end in ("sep", "cls"):
        if end in changed:
            changed[end] = [changed[end][0], new[changed[end][1]]]
    if changed.get("processors"):
        changed["processors"] = [_renumbered(inner, new) for inner in changed["processors"]]
    return changed
