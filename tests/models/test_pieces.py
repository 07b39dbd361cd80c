"""Tokenizers with fewer pieces against the tokenizers library, which splits texts by the documents."""

import itertools
import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from compress.core.errors import PlanError
from compress.models.pieces import TokenizerDocument

TEXT = (
    "the cat sat on the mat and the rat sat on the hat; that cat chatted with a fat bat, then the rattled "
    "rabbit chattered at them all: whatever, said the hatter, the matter is settled."
)
OTHER = "Naïve ☃ zebras quiz; 漢字\n\tand 12 more!"


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Pairs with several ways to a piece, as conversions from SentencePiece have."""
    merges = [
        ("t", "h"),
        ("h", "e"),
        ("th", "e"),
        ("t", "he"),
        ("a", "t"),
        ("c", "at"),
        ("c", "a"),
        ("ca", "t"),
    ]
    merges += [("▁", "the"), ("▁", "cat"), ("▁t", "he"), ("▁", "t"), ("r", "at"), ("▁", "r"), ("▁r", "at")]
    made = dict.fromkeys(left + right for left, right in merges)
    letters = dict.fromkeys("▁theacrsonmd")
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *made]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def unigram() -> Tokenizer:
    generator = random.Random(0)
    parts = {TEXT[at : at + size] for at in range(len(TEXT)) for size in (2, 3, 4)}
    parts = {part.replace(" ", "▁") for part in parts if " " not in part[1:]}
    scores = {part: -generator.uniform(4, 9) for part in sorted(parts)}
    letters = {letter: -generator.uniform(9, 11) for letter in sorted({*TEXT.replace(" ", "▁")})}
    raw = {f"<0x{byte:02X}>": -12.0 for byte in range(256)}
    vocabulary = [("<unk>", 0.0), *raw.items(), *{**letters, **scores}.items()]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


KINDS = {"bytes": byte_level, "fallback": byte_fallback, "unigram": unigram, "word pieces": word_piece}


def restricted(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Tokenizer, dict[int, int]]:
    """The tokenizer with what some texts use, and new numbers by old ones."""
    document = TokenizerDocument(tokenizer.to_str(), "a tokenizer")
    used = {number for text in texts for number in tokenizer.encode(text, add_special_tokens=False).ids}
    kept = document.closed(used | document.lasting())
    new = {number: place for place, number in enumerate(sorted(kept))}
    return Tokenizer.from_str(json.dumps(document.restricted(new))), new


@pytest.mark.parametrize("kind", KINDS)
def test_texts_keep_their_pieces_and_others_can_be_read(kind: str) -> None:
    before = KINDS[kind]()
    words = TEXT.split()
    generator = random.Random(0)
    sizes = set()
    for _ in range(20):
        texts = [" ".join(generator.sample(words, generator.randint(1, 6))) for _ in range(3)]
        after, new = restricted(before, texts)
        sizes.add(len(new))
        assert after.get_vocab_size() == len(new) <= before.get_vocab_size()
        for text in texts:
            was, now = before.encode(text), after.encode(text)
            assert now.tokens == was.tokens
            assert now.ids == [new[number] for number in was.ids]
        if kind != "word pieces":
            for text in (TEXT, OTHER):
                numbers = after.encode(text, add_special_tokens=False).ids
                assert after.decode(numbers, skip_special_tokens=False) == text
    assert len(sizes) > 1
    assert min(sizes) < before.get_vocab_size()


BYTES = byte_level()


@given(st.lists(st.sampled_from(TEXT.split()), min_size=1, max_size=8))
def test_the_way_to_each_piece_stays(words: list[str]) -> None:
    text = " ".join(words)
    after, _ = restricted(BYTES, [text])
    assert after.encode(text).tokens == BYTES.encode(text).tokens


def test_only_the_pieces_on_the_way_stay_where_several_pairs_make_one() -> None:
    document = TokenizerDocument(byte_fallback().to_str(), "a tokenizer")
    numbers = document.numbers

    def closed(piece: str) -> set[str]:
        texts = {number: text for text, number in numbers.items()}
        return {texts[number] for number in document.closed([numbers[piece]])}

    # "t h" comes before "h e", and "a t" before "c a": these are the ways that the library takes.
    assert closed("the") == {"the", "th", "t", "h", "e"}
    assert closed("cat") == {"cat", "at", "c", "a", "t"}
    assert closed("▁the") == {"▁the", "▁", "the", "th", "t", "h", "e"}
    assert closed("m") == {"m"}


def test_pairs_stay_when_both_parts_and_the_result_do() -> None:
    document = TokenizerDocument(byte_fallback().to_str(), "a tokenizer")
    kept = sorted({document.numbers[piece] for piece in ("t", "h", "e", "th", "the", "<unk>", "<s>")})
    model = document.restricted({number: place for place, number in enumerate(kept)})["model"]
    assert [tuple(pair) for pair in model["merges"]] == [("t", "h"), ("th", "e")]
    assert model["vocab"] == {"<unk>": 0, "<s>": 1, "t": 2, "h": 3, "e": 4, "th": 5, "the": 6}


@pytest.mark.parametrize(
    ("prefix", "suffix"), [("##", ""), ("", "</w>")], ids=["a prefix within words", "a suffix of words"]
)
def test_pairs_with_marks(prefix: str, suffix: str) -> None:
    marks = {"continuing_subword_prefix": prefix, "end_of_word_suffix": suffix}
    options: dict[str, Any] = {name: mark for name, mark in marks.items() if mark}
    tokenizer = Tokenizer(models.BPE(unk_token="?", **options))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=110, special_tokens=["?"], show_progress=False, **options)
    tokenizer.train_from_iterator([TEXT], trainer)
    text = "the hatter chatted with the rabbit"
    after, new = restricted(tokenizer, [text])
    assert after.encode(text).tokens == tokenizer.encode(text).tokens
    assert len(new) < tokenizer.get_vocab_size()


def test_what_is_put_around_a_text_has_new_numbers() -> None:
    tokenizer = word_piece()
    tokenizer.add_tokens([AddedToken("extra", special=False)])
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    document = TokenizerDocument(tokenizer.to_str(), "a tokenizer")
    assert {0, 1, 2, 3, tokenizer.token_to_id("extra")} <= document.lasting()
    kept = sorted(document.lasting())
    # Everything moves by one.
    new = {number: place + 1 for place, number in enumerate(kept)}
    changed = document.restricted(new)
    assert changed["post_processor"]["sep"] == ["[SEP]", 4]
    assert changed["post_processor"]["cls"] == ["[CLS]", 3]
    assert changed["padding"]["pad_id"] == 1
    assert {entry["content"]: entry["id"] for entry in changed["added_tokens"]}["extra"] == len(kept)


def test_processors_in_a_sequence_and_templates_have_new_numbers() -> None:
    tokenizer = byte_fallback()
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    after, new = restricted(tokenizer, ["cat"])
    assert new[1] == 1
    assert after.encode("cat").tokens == tokenizer.encode("cat").tokens
    document = TokenizerDocument(tokenizer.to_str(), "a tokenizer")
    shifted = {number: number + 7 for number in document.lasting()}
    processor = document.restricted(shifted)["post_processor"]["processors"][1]
    assert processor["special_tokens"]["<s>"]["ids"] == [8]


def test_the_least_likely_piece_stays_for_the_price_of_the_unknown() -> None:
    pieces = [("<unk>", 0.0), ("a", -1.0), ("ab", -2.0), ("rare", -40.0)]
    document = TokenizerDocument(Tokenizer(models.Unigram(pieces, unk_id=0)).to_str(), "a tokenizer")
    assert document.lasting() == {0, 1, 3}
    assert document.restricted({0: 0, 1: 1, 3: 2})["model"]["vocab"] == [
        ["<unk>", 0.0],
        ["a", -1.0],
        ["rare", -40.0],
    ]


@pytest.mark.parametrize("kind", ["words", "dropout"])
def test_other_tokenizers_are_refused(kind: str) -> None:
    model: Any = models.WordLevel({"a": 0}, unk_token="a") if kind == "words" else models.BPE(dropout=0.1)
    with pytest.raises(PlanError, match=r"fall back on nothing|at random") as refusal:
        TokenizerDocument(Tokenizer(model).to_str(), "the tokenizer of MODEL")
    assert refusal.value.hint


def test_every_pair_of_a_byte_vocabulary_is_found() -> None:
    document = TokenizerDocument(BYTES.to_str(), "a tokenizer")
    everything = set(document.numbers.values())
    assert document.closed(everything) == everything
    model = document.restricted({number: number for number in everything})["model"]
    assert model["vocab"] == json.loads(BYTES.to_str())["model"]["vocab"]
    assert len(model["merges"]) == len(json.loads(BYTES.to_str())["model"]["merges"])
    assert all(left + right in model["vocab"] for left, right in itertools.islice(model["merges"], 10))
