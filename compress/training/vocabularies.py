"""Students and teachers whose vocabularies are not the same table: padded ones, and other tokenizers.

Tables are often padded to a round number of rows: the same tokenizer of 32,000 tokens stands behind 32,000
and behind 32,064 rows. What counts is what the tokenizer can say; the rows behind it are left out on both
sides.

Of another tokenizer the windows of the student are read as text, and the text is given to the teacher in its
own tokens. The two are compared after every token at whose end, in characters of the text, both have a token
that ends.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, final

import torch

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.run import Run
from compress.models.load import tokenizer
from compress.models.positions import positions
from compress.training.head import Halves

_BROKEN: Final = "\ufffd"
"""What tokenizers decode a part of a character to."""
_LONGEST_CHARACTER: Final = 4
"""Bytes, and so tokens at most, of one character."""


@final
class Restricted(Halves):
    """A model whose logits end with what its tokenizer can say.

    Args:
        model: in two halves.
        count: tokens that are left.
    """

    def __init__(self, model: Halves, count: int) -> None:
        self._model = model
        self._count = count

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Halves.states`."""
        return self._model.states(tokens)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """See `Halves.logits`."""
        return self._model.logits(states)[..., : self._count]


def restricted(model: Halves, rows: int, count: int) -> Halves:
    """A model whose table has so many rows, with the logits of the first `count` of them."""
    return model if count == rows else Restricted(model, count)


@dataclass(frozen=True)
class Reading:
    """A window of the student as its teacher reads it.

    Attributes:
        tokens: of the teacher.
        ours: positions of the student at which both have read the same text, in order.
        theirs: positions of the teacher at which it has read that.
    """

    tokens: tuple[int, ...]
    ours: tuple[int, ...]
    theirs: tuple[int, ...]


@final
class Translation:
    """Two tokenizers.

    Args:
        ours: of the student.
        theirs: of the teacher.
        room: tokens that the teacher reads at most, or ``None``.

    Attributes:
        pairs: int64 ``[n, 2]``, tokens of student and teacher that stand for the same characters, when no
            other token of the same tokenizer does.
    """

    def __init__(self, ours: Any, theirs: Any, room: int | None = None) -> None:
        self._ours, self._theirs, self._room = ours, theirs, room
        self._special = set(ours.all_special_ids)
        mine, others = pieces(ours), pieces(theirs)
        pairs = sorted((mine[piece], others[piece]) for piece in mine.keys() & others.keys())
        pairs += [pair for pair in self._ends() if pair not in pairs]
        self.pairs = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
        self.read = lru_cache(maxsize=4096)(self._read)

    def _ends(self) -> list[tuple[int, int]]:
        """Tokens for the beginning and the end of a text, where both have one."""
        found: dict[int, int] = {}
        for name in ("eos_token_id", "bos_token_id"):
            ours, theirs = getattr(self._ours, name, None), getattr(self._theirs, name, None)
            if ours is not None and theirs is not None and theirs not in found.values():
                found.setdefault(ours, theirs)
        return list(found.items())

    def _read(self, window: tuple[int, ...]) -> Reading:
        """One window of the student."""
        ends = dict(self._ends())
        tokens: list[int] = []
        pairs: list[tuple[int, int]] = []
        start = 0
        for place in range(len(window) + 1):
            if place < len(window) and window[place] not in self._special:
                continue
            self._plain(window, start, place, tokens, pairs)
            if place < len(window) and window[place] in ends:
                tokens.append(ends[window[place]])
                pairs.append((place, len(tokens) - 1))
            start = place + 1
        if self._room is not None:
            tokens = tokens[: self._room]
        # What follows the last token is asked of neither.
        kept = [pair for pair in pairs if pair[0] < len(window) - 1 and pair[1] < len(tokens) - 1]
        return Reading(tuple(tokens), tuple(pair[0] for pair in kept), tuple(pair[1] for pair in kept))

    def _plain(
        self, window: tuple[int, ...], start: int, stop: int, tokens: list[int], pairs: list[tuple[int, int]]
    ) -> None:
        """Read the text between special tokens: the teacher's tokens, and the positions that are the same."""
        said = list(window[start:stop])
        text = _decoded(self._ours, said)
        for _ in range(_LONGEST_CHARACTER):
            if said and text.endswith(_BROKEN):
                said.pop()
                text = _decoded(self._ours, said)
        if not said or not text:
            return
        mine, others = (_encoded(words, text) for words in (self._ours, self._theirs))
        # A window that begins within a word is read differently there; from some token on it is the same.
        same = 0
        while same < min(len(said), len(mine)) and said[-1 - same] == mine[-1 - same][0]:
            same += 1
        base = len(tokens)
        tokens += [token for token, _ in others]
        place_of = {end: base + place for place, (_, end) in enumerate(others)}
        last: dict[int, int] = {}
        for behind in range(same, 0, -1):
            # Of several tokens of one character the last completes it.
            last[mine[-behind][1]] = start + len(said) - behind
        pairs += [(place, place_of[end]) for end, place in last.items() if end in place_of]


def pieces(words: Any) -> dict[str, int]:
    """Tokens by the characters that they add to a text; no special ones, no parts of characters.

    Where several tokens add the same, it is the one that the tokenizer itself uses, or none.
    """
    anchor = words.encode("a", add_special_tokens=False)[-1:]
    before = len(_decoded(words, anchor))
    found: dict[str, int] = {}
    several: set[str] = set()
    special = set(words.all_special_ids)
    for number in sorted(set(words.get_vocab().values()) - special):
        piece = _decoded(words, [*anchor, number])[before:]
        if not piece or _BROKEN in piece:
            continue
        if piece in found:
            several.add(piece)
        found.setdefault(piece, number)
    for piece in several:
        spelled = words.encode(f"a{piece}", add_special_tokens=False)
        if len(spelled) == 2 and spelled[:1] == anchor:
            found[piece] = spelled[1]
        else:
            del found[piece]
    return found


def translation(source: Artifact, teacher: Artifact, run: Run) -> Translation:
    """The tokenizers of two models that do not share one.

    Raises:
        PlanError: they do share one; a tokenizer does not say where its tokens lie in a text; or the two have
            no token in common.
    """
    ours, theirs = (tokenizer(model, trust_remote_code=run.trust_remote_code) for model in (source, teacher))
    if ours.get_vocab() == theirs.get_vocab():
        raise PlanError(
            f"{source.path} and teacher {teacher.path} have the same tokenizer",
            "leave --vocabulary out: probabilities are compared token by token",
        )
    for model, words in ((source, ours), (teacher, theirs)):
        if not words.is_fast:
            raise PlanError(
                f"the tokenizer of {model.path} does not say where its tokens lie in a text",
                "give a model with a tokenizer.json",
            )
    found = Translation(ours, theirs, positions(teacher.config))
    if len(found.pairs) == 0:
        raise PlanError(
            f"no token of {source.path} stands for the same characters as one of teacher {teacher.path}",
            "give a teacher for the same kind of text",
        )
    return found


def _decoded(words: Any, tokens: list[int]) -> str:
    text: str = words.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _encoded(words: Any, text: str) -> list[tuple[int, int]]:
    """Tokens with the place in the text at which each ends."""
    found = words(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [(token, end) for token, (_, end) in zip(found["input_ids"], found["offset_mapping"], strict=True)]
