"""A tokenizer as GGUF describes it: tokens, their types, merges or scores, and what is added around a text.

Two kinds are known, by what the loaded tokenizer says of itself: byte-level pairs (GPT-2's kind), whose rule
for splitting text llama.cpp has to know by name; and pairs over SentencePiece's characters with bytes to fall
back on (Llama 2's kind), where scores say in which order tokens are put together.
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from compress.core.errors import PlanError

if TYPE_CHECKING:
    import gguf

    from compress.core.artifact import Artifact

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITTERS: Final[Mapping[tuple[str, ...], str]] = {
    ("bytes and words",): "gpt-2",
    ("digits", "bytes and words"): "smollm",
    (f"{_CONTRACTIONS}|{_LETTERS}|\\p{{N}}{{1,3}}|{_REST}", "bytes"): "llama-bpe",
    (f"{_CONTRACTIONS}|{_LETTERS}|\\p{{N}}|{_REST}", "bytes"): "qwen2",
    (_TEKKEN, "bytes"): "tekken",
}
"""How text is split before pairs are put together, to the name under which llama.cpp knows it
(`llm_tokenizer_bpe` in `src/llama-vocab.cpp`)."""
_WHOLE_WORDS: Final = frozenset({"llama-bpe", "tekken"})
"""Rules with which llama.cpp takes a word that is a token whole, without putting it together."""
_FILES: Final = ("tokenizer*", "vocab.*", "*.tiktoken", "*.model", "tekken.json")
"""One of which a folder with a tokenizer has."""
_SPACE: Final = "▁"
_BYTE: Final = re.compile(r"^<0x[0-9A-F]{2}>$")


@dataclass(frozen=True)
class Vocabulary:
    """What goes into the metadata.

    Attributes:
        model: ``gpt2``, ``llama``, or ``no_vocab`` where the folder has no tokenizer.
        splitter: name of the rule that splits text; none for ``llama``.
        tokens: the texts by number, one for each row of the embedding.
        types: the format's type of each.
        merges: of ``gpt2``: the pairs in the order in which they are put together.
        scores: of ``llama``: the higher, the sooner put together.
        add_space_prefix: of ``llama``: whether a blank is put before a text.
        add_bos: whether a text begins with the token of its beginning.
        add_eos: whether it ends with the token of its end.
    """

    model: str = "no_vocab"
    splitter: str | None = None
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    add_space_prefix: bool = False
    add_bos: bool = False
    add_eos: bool = False

    def write(self, metadata: "gguf.GGUFWriter", source: "Artifact") -> None:
        """Add everything to a file: tokens, special tokens, merges, chat template."""
        import gguf

        metadata.add_tokenizer_model(self.model)
        if self.model == "no_vocab":
            return
        metadata.add_tokenizer_pre(self.splitter or "default")
        metadata.add_token_list(self.tokens)
        if self.scores:
            metadata.add_token_scores(self.scores)
            metadata.add_add_space_prefix(self.add_space_prefix)
        metadata.add_token_types(self.types)
        metadata.add_token_merges(self.merges)
        with _quiet():
            special = gguf.SpecialVocab(source.path, load_merges=False, n_vocab=len(self.tokens))
            special.add_special_token |= {"bos": self.add_bos, "eos": self.add_eos}
            special.add_to_gguf(metadata, quiet=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the package's guesses at what surrounds a text: that was found by asking the tokenizer."""
    logger = logging.getLogger("gguf")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def vocabulary(source: "Artifact", rows: int, *, trust_remote_code: bool = False) -> Vocabulary:
    """The tokenizer of a folder as the format has it.

    Args:
        source: the artifact.
        rows: of the embedding; numbers without a token get unused ones.
        trust_remote_code: whether code inside the model folder may run.

    Raises:
        PlanError: llama.cpp has nothing that splits or joins text in the same way.
    """
    from compress.models.load import tokenizer

    if not any(file for pattern in _FILES for file in source.path.glob(pattern)):
        return Vocabulary()
    words = tokenizer(source, trust_remote_code=trust_remote_code)
    backend = getattr(words, "backend_tokenizer", None)
    if backend is None:
        raise PlanError(
            f"{source.path} has a tokenizer of Python code ({type(words).__name__}), which GGUF cannot hold",
            "put the model's tokenizer.json into the folder",
        )
    # What is loaded is what the model is served with; for some architectures that is not all in the file.
    document = json.loads(backend.to_str())
    model, where = document["model"], f"the tokenizer of {source.path}"
    if model.get("type") != "BPE":
        raise PlanError(
            f"{where} is a {model.get('type')} tokenizer; GGUF is written for byte-level and Llama's BPE"
        )
    tokens, types = _tokens(document, rows)
    begins, ends = _added(words, where)
    found = Vocabulary("gpt2", None, tokens, types, add_bos=begins, add_eos=ends)
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    if model.get("byte_fallback"):
        scores, prefixed = _scores(merges, tokens), _prefixes_space(document)
        return replace(found, model="llama", scores=scores, add_space_prefix=prefixed)
    if any(" " in part for pair in merges for part in pair):
        raise PlanError(f"{where} merges blanks, which GGUF has no way to write")
    return replace(found, splitter=_splitter(document, where), merges=[" ".join(pair) for pair in merges])


def _tokens(document: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Texts and types by number."""
    import gguf

    kind = gguf.TokenType
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [int(kind.UNUSED)] * rows
    unknown = document["model"].get("unk_token")
    for text, number in document["model"]["vocab"].items():
        if number < rows:
            tokens[number] = text
            byte = document["model"].get("byte_fallback") and _BYTE.match(text)
            types[number] = int(kind.BYTE if byte else kind.NORMAL)
    for entry in document.get("added_tokens") or []:
        if entry["id"] < rows:
            tokens[entry["id"]] = entry["content"]
            types[entry["id"]] = int(kind.CONTROL if entry["special"] else kind.USER_DEFINED)
            if entry["content"] == unknown:
                types[entry["id"]] = int(kind.UNKNOWN)
    return tokens, types


def _scores(merges: list[tuple[str, ...]], tokens: list[str]) -> list[float]:
    """The score of each token: less the place of the first merge that makes it.

    SentencePiece puts together the neighbours whose token has the highest score, byte pairs those whose
    merge comes first, so both do the same. What no merge makes comes last.
    """
    places: dict[str, int] = {}
    for place, pair in enumerate(merges):
        places.setdefault("".join(pair), place)
    behind = len(places)
    return [-float(places.get(token, behind + number)) for number, token in enumerate(tokens)]


def _prefixes_space(document: Mapping[str, Any]) -> bool:
    """Whether a blank comes before a text; refuses what is neither that nor its absence.

    Raises:
        PlanError: text is changed in a way that llama.cpp does not know.
    """
    steps = _flat(document.get("normalizer"), "normalizers")
    prefixed = False
    for step in steps:
        if step["type"] == "Prepend" and step.get("prepend") == _SPACE:
            prefixed = True
        elif not (step["type"] == "Replace" and step.get("pattern") == {"String": " "}):
            raise PlanError(f"the tokenizer's normalizer {step['type']} is unknown to llama.cpp")
    for step in _flat(document.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] != "Metaspace":
            raise PlanError(f"the tokenizer's pre-tokenizer {step['type']} is unknown to llama.cpp")
        prefixed |= step.get("prepend_scheme", "always") != "never"
    return prefixed


def _splitter(document: Mapping[str, Any], where: str) -> str:
    """The name of the rule that splits text.

    Raises:
        PlanError: llama.cpp has none that splits the same way.
    """
    normalizers = [step["type"] for step in _flat(document.get("normalizer"), "normalizers")]
    rules = tuple(_rule(step) for step in _flat(document.get("pre_tokenizer"), "pretokenizers"))
    name = _SPLITTERS.get(rules)
    # Composed characters are what nearly every text has; llama.cpp takes Qwen's tokenizer for one without.
    if name is None or any(kind != "NFC" for kind in normalizers):
        said = ", ".join([*normalizers, *rules]) or "nothing"
        raise PlanError(
            f"{where} splits text by {said}; llama.cpp has no tokenizer of GGUF's that does the same"
        )
    if bool(document["model"].get("ignore_merges")) and name not in _WHOLE_WORDS:
        raise PlanError(f"{where} takes whole words without merges, which llama.cpp's '{name}' does not")
    return name


def _rule(step: Mapping[str, Any]) -> str:
    kind = str(step["type"])
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "bytes and words" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex", kind))
    return kind


def _flat(step: Any, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a sequence, or the only step, or none."""
    if not step:
        return []
    if step["type"] == "Sequence":
        return [part for entry in step[inner] for part in _flat(entry, inner)]
    return [step]


def _added(words: Any, where: str) -> tuple[bool, bool]:
    """Whether the tokenizer begins and ends a text with its special tokens, found by asking it."""
    with_them = words.encode("a")
    without = words.encode("a", add_special_tokens=False)
    begins = with_them[:1] == [words.bos_token_id] and without[:1] != with_them[:1]
    ends = with_them[-1:] == [words.eos_token_id] and without[-1:] != with_them[-1:]
    if len(with_them) != len(without) + begins + ends:
        raise PlanError(
            f"{where} adds tokens that are neither its beginning nor its end",
            "llama.cpp adds those two alone",
        )
    return begins, ends
