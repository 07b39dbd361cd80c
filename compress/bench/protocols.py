"""The conventions by which a text becomes the sequences whose likelihood is a perplexity.

Four are in use, and their figures differ by more than a compression does:

- ``windows``: the documents joined, cut into disjoint windows; every token of a window after its first is a
  target. The convention of GPTQ (Frantar et al. 2023) and of most papers since, with 2,048 tokens.
- ``documents``: each document by itself after the beginning-of-text token, cut at the window.
- ``llama.cpp``: windows of 512 tokens of the joined text, the first token of each replaced by the
  beginning-of-text token where the tokenizer adds one by itself. Of a window of n tokens those after
  position n/2 are targets, n - 1 - n/2 of them, so that each has half a window of context.
- ``lm-eval``: lm-evaluation-harness's rolling likelihood. Every token of a document is a target, read in
  windows of the model's length that overlap by the one token that comes before; the first window begins
  with the beginning-of-text token (else the end-of-text token). The last window reaches back to the full
  length. The tokenizer adds its special tokens as it would by itself, and they are targets too.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final

from compress.core.bench import Bench
from compress.core.errors import DataError, UsageError
from compress.data.corpora import Documents

FEWEST_DOCUMENTS: Final = 20
"""From this many documents on they are the independent units; an interval over fewer says little, and the
windows are taken, which within a document are not quite independent."""

_WINDOWS: Final = {"windows": 2_048, "documents": 2_048, "llama.cpp": 512}
_ROLLING_WINDOW: Final = 2_048
"""The harness's own default, where neither the model nor the tokenizer names a length."""
_NO_LENGTH: Final = 10**9
"""A tokenizer without a length says a very large number."""
_CHARACTERS_PER_TOKEN: Final = 8
_SAFE_END: Final = 64
"""Tokens before a cut that the cut may have changed."""


@dataclass
class Sequences:
    """What is scored.

    Attributes:
        tokens: of each sequence.
        starts: position of the first target in each; all tokens from there on are targets.
        documents: number of the document in which each sequence starts; empty where the tokenizer does not
            say which characters a token covers.
        words, bytes: of each sequence's targets: those of the document, shared out among its sequences by
            their targets, so that sums are the document's. Empty where the protocol does not count them.
        protocol: what a figure under it holds for.
    """

    tokens: list[list[int]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    words: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)
    protocol: dict[str, Any] = field(default_factory=dict)

    @property
    def targets(self) -> list[int]:
        """Of each sequence."""
        return [len(tokens) - start for tokens, start in zip(self.tokens, self.starts, strict=True)]


def sequences(tokenizer: Any, documents: Documents, options: Bench, positions: int | None) -> Sequences:
    """The sequences of a text under the protocol of the options.

    Args:
        tokenizer: of the model, as transformers loads it.
        positions: the most tokens that the model reads; none where it has no limit.

    Raises:
        DataError: the text is too short.
        UsageError: the options do not fit the model or its tokenizer.
    """
    window = _window(tokenizer, options, positions)
    if options.protocol == "lm-eval":
        found = _rolling(tokenizer, documents.texts, window, options)
    elif options.protocol == "documents":
        found = _by_document(tokenizer, documents.texts, window, options)
    else:
        found = _of_joined_text(tokenizer, documents.texts, window, options)
    if not found.tokens:
        least = f"{window} tokens" if options.protocol == "llama.cpp" else "two tokens"
        raise DataError(
            f"{documents.description} is too short to score: no sequence has {least}", "give a longer text"
        )
    enough = len(set(found.documents)) >= FEWEST_DOCUMENTS
    by_document = enough or options.protocol == "documents"
    found.documents = found.documents if by_document else []
    found.protocol = {
        "kind": options.protocol,
        "window": window,
        "stride": window,
        **found.protocol,
        "clusters": "document" if by_document else "window",
        "targets": sum(found.targets),
    }
    return found


def _window(tokenizer: Any, options: Bench, positions: int | None) -> int:
    if options.protocol == "lm-eval":
        named = int(tokenizer.model_max_length)
        usual = positions or (named if named < _NO_LENGTH else _ROLLING_WINDOW)
        fewest = 1
    else:
        usual = _WINDOWS[options.protocol]
        usual = min(usual, positions or usual)
        fewest = 3 if options.protocol == "llama.cpp" else 2
    window = options.window or usual
    if positions is not None and window > positions:
        raise UsageError(f"a window of {window} tokens, and the model has {positions} positions", "give less")
    if window < fewest:
        noun = "token" if window == 1 else "tokens"
        raise UsageError(f"a window of {window} {noun} predicts nothing", f"give at least {fewest}")
    return window


def _beginning(tokenizer: Any, options: Bench, usual: bool) -> list[int]:
    """The beginning-of-text token where sequences start with it, else nothing."""
    bos = options.bos if options.bos is not None else usual
    if bos and tokenizer.bos_token_id is None:
        raise UsageError("the tokenizer has no beginning-of-text token", "set bos: false")
    return [int(tokenizer.bos_token_id)] if bos else []


def _adds_beginning(tokenizer: Any) -> bool:
    """Whether the tokenizer by itself puts the beginning-of-text token before a text."""
    beginning = tokenizer.bos_token_id
    return beginning is not None and tokenizer.encode("a", verbose=False)[:1] == [beginning]


def _plain(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return tokens


def _by_document(tokenizer: Any, texts: Sequence[str], window: int, options: Bench) -> Sequences:
    """Each document by itself, cut at the window, up to a number of tokens in all."""
    before = _beginning(tokenizer, options, usual=tokenizer.bos_token_id is not None)
    found = Sequences(protocol={"bos": bool(before)})
    taken = 0
    for number, text in enumerate(texts):
        if taken >= options.tokens:
            break
        tokens = [*before, *_plain(tokenizer, text)][:window]
        if len(tokens) > 1:
            found.tokens.append(tokens)
            found.starts.append(1)
            found.documents.append(number)
            taken += len(tokens)
    return found


def _of_joined_text(tokenizer: Any, texts: Sequence[str], window: int, options: Bench) -> Sequences:
    """Disjoint windows of the joined text. A rest that fills no window is left out, unless it is all."""
    halves = options.protocol == "llama.cpp"
    before = _beginning(tokenizer, options, usual=halves and _adds_beginning(tokenizer))
    tokens, places = _encoded_start(tokenizer, options.join.join(texts), options.tokens)
    found = Sequences(protocol={"bos": bool(before), "join": options.join})
    if halves:
        # The beginning-of-text token stands before the text, and in the later windows replaces a token.
        tokens, places = [*before, *tokens], [*places[: len(before)], *places]
        tokens = tokens[: options.tokens]
        step, kept = window, len(before)
    else:
        step, kept = window - len(before), 0
    beginnings = [0, *accumulate(len(text) + len(options.join) for text in texts)][:-1]
    for at in range(0, len(tokens) - step + 1, step):
        found.tokens.append([*before, *tokens[at + kept : at + step]])
        found.starts.append(window // 2 + 1 if halves else 1)
        if places:
            found.documents.append(bisect_right(beginnings, places[at]) - 1)
    if not found.tokens and not halves and len(before) + len(tokens) > 1:
        found.tokens, found.starts = [[*before, *tokens]], [1]
    return found


def _encoded_start(tokenizer: Any, joined: str, most: int) -> tuple[list[int], list[int]]:
    """At most so many tokens of a text, and at which character each begins (empty where nobody knows)."""
    characters = most * _CHARACTERS_PER_TOKEN
    while True:
        whole = characters >= len(joined)
        encoded = tokenizer(
            joined[:characters],
            add_special_tokens=False,
            return_offsets_mapping=bool(tokenizer.is_fast),
            verbose=False,
        )
        tokens: list[int] = encoded["input_ids"]
        if whole or len(tokens) >= most + _SAFE_END:
            break
        characters *= 2
    places = [start for start, _ in encoded["offset_mapping"][:most]] if tokenizer.is_fast else []
    return tokens[:most], places


def _rolling(tokenizer: Any, texts: Sequence[str], window: int, options: Bench) -> Sequences:
    """Whole documents, up to a number of tokens in all, where the last one is cut between two words."""
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None:
        raise UsageError(
            "the tokenizer has no beginning- or end-of-text token, with which the protocol lm-eval begins",
            "take the protocol windows",
        )
    special = options.bos if options.bos is not None else True
    found = Sequences(protocol={"bos": special and _adds_beginning(tokenizer), "prefix": int(prefix)})
    words = octets = 0
    left = options.tokens
    for number, text in enumerate(texts):
        if left <= 0:
            break
        text, tokens = _cut(tokenizer, text, left, special)
        if not tokens:
            continue
        left -= len(tokens)
        # As the harness counts them: white space at an end makes an empty word there.
        document = (len(re.split(r"\s+", text)), len(text.encode("utf-8")))
        words, octets = words + document[0], octets + document[1]
        for sequence, start in rolled(tokens, int(prefix), window):
            share = (len(sequence) - start) / len(tokens)
            found.tokens.append(sequence)
            found.starts.append(start)
            found.documents.append(number)
            found.words.append(document[0] * share)
            found.bytes.append(document[1] * share)
    found.protocol |= {"words": words, "bytes": octets}
    return found


def _cut(tokenizer: Any, text: str, most: int, special: bool) -> tuple[str, list[int]]:
    """A text and its tokens; of a text with too many tokens about as much as gives so many."""
    longest = most * _CHARACTERS_PER_TOKEN
    shortened = text if len(text) <= longest else _to_word(text, longest)
    begins = tokenizer.bos_token is not None and shortened.startswith(tokenizer.bos_token)
    tokens: list[int] = tokenizer.encode(shortened, add_special_tokens=special and not begins, verbose=False)
    if len(tokens) > most:
        shortened = _to_word(shortened, len(shortened) * most // len(tokens))
        tokens = tokenizer.encode(shortened, add_special_tokens=special and not begins, verbose=False)
    return shortened, tokens


def _to_word(text: str, length: int) -> str:
    """The beginning of a text, ending with a whole word where there is one."""
    ends = [match.start() for match in re.finditer(r"\s+", text[: length + 1])]
    return text[: ends[-1]] if ends and ends[-1] > 0 else text[: max(length, 1)]


def rolled(tokens: Sequence[int], prefix: int, window: int) -> list[tuple[list[int], int]]:
    """Sequences of at most ``window + 1`` tokens, each with the position of its first target.

    All tokens are targets once. A model reads a sequence without its last token, ``window`` at most.
    """
    found = [([prefix, *tokens[:window]], 1)]
    for at in range(window, len(tokens), window):
        end = min(at + window, len(tokens))
        found.append((list(tokens[end - window - 1 : end]), window + 1 - (end - at)))
    return found
