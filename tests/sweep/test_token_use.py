"""Which tokens stay: those that are used, those they are made of, and what fills up."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from compress.core.errors import DataError, VerificationError
from compress.models.pieces import TokenizerDocument
from compress.sweep.token_use import PROBES, Choice, Use, choose, count, plain, prove

TEXT = ["the cat sat on the mat", "the rat chattered at the hatter and the cat"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([*TEXT, "zebras quiz zebras quiz"], trainer)
    made.add_special_tokens(["<end>"])
    return made


def test_tokens_are_counted_over_all_texts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    use = count(tokenizer, iter(TEXT))
    assert use.characters == sum(map(len, TEXT))
    expected = [number for text in TEXT for number in tokenizer.encode(text).ids]
    assert use.tokens == len(expected)
    assert use.counts == {number: expected.count(number) for number in set(expected)}
    use.write(tmp_path / "tokens.json")
    assert Use.read(tmp_path / "tokens.json") == use
    assert Use.read(tmp_path / "other.json") is None
    with pytest.raises(DataError, match="no token"):
        count(tokenizer, [""])


def test_a_tokenizer_neither_cuts_nor_pads_when_it_counts(tokenizer: Tokenizer) -> None:
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_truncation(2)
    other.enable_padding(length=9)
    assert len(plain(other.to_str()).encode(TEXT[0]).ids) == len(tokenizer.encode(TEXT[0]).ids) > 2


def test_used_tokens_stay_with_all_they_are_made_of_and_keep_their_order(tokenizer: Tokenizer) -> None:
    document = TokenizerDocument(tokenizer.to_str(), "a tokenizer")
    rows = tokenizer.get_vocab_size() + 5
    use = count(tokenizer, TEXT)
    choice = choose(document, use, {rows - 1}, rows)
    assert set(use.counts) < set(choice.kept)
    assert document.closed(choice.kept) == set(choice.kept)
    # A row without a token that a configuration names comes last.
    assert choice.kept[-1] == rows - 1
    assert list(choice.kept) == sorted(choice.kept)
    assert choice.new[choice.kept[3]] == 3
    assert choice.used + choice.lasting + choice.within + choice.filled == len(choice.kept)
    assert choice.filled == 0


def test_the_number_is_filled_up_with_tokens_that_can_be_reached(tokenizer: Tokenizer) -> None:
    document = TokenizerDocument(tokenizer.to_str(), "a tokenizer")
    rows = tokenizer.get_vocab_size() + 40
    plainly = choose(document, count(tokenizer, TEXT[:1]), (), rows)
    choice = choose(document, count(tokenizer, TEXT[:1]), (), rows, multiple=16)
    assert len(choice.kept) % 16 == 0
    assert 0 <= choice.filled == len(choice.kept) - len(plainly.kept) < 16
    assert document.closed(choice.kept) == set(choice.kept)
    # Tokens that exist come before rows that no token has.
    assert max(choice.kept) < tokenizer.get_vocab_size()


def test_rare_tokens_go_where_that_is_asked_for(tokenizer: Tokenizer) -> None:
    document = TokenizerDocument(tokenizer.to_str(), "a tokenizer")
    rows = tokenizer.get_vocab_size()
    use = count(tokenizer, TEXT)
    assert choose(document, use, (), rows, least=2).used == sum(times >= 2 for times in use.counts.values())


def test_nothing_to_take_out_is_an_error(tokenizer: Tokenizer) -> None:
    document = TokenizerDocument(tokenizer.to_str(), "a tokenizer")
    rows = tokenizer.get_vocab_size()
    with pytest.raises(DataError, match="nothing would go"):
        choose(document, count(tokenizer, TEXT), (), rows, multiple=512)
    everything = Use(dict.fromkeys(range(rows), 1), 1)
    with pytest.raises(DataError, match="nothing would go"):
        choose(document, everything, (), rows)


def test_a_tokenizer_that_splits_otherwise_is_found_out(tokenizer: Tokenizer) -> None:
    rows = tokenizer.get_vocab_size()
    same = Choice(tuple(range(rows)), rows, 0, 0, 0)
    tokens = sum(len(tokenizer.encode(text).ids) for text in TEXT)
    assert prove(tokenizer, tokenizer, same, TEXT, lossless=True) == tokens
    other = Tokenizer.from_str(tokenizer.to_str())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(VerificationError, match="has other pieces than before from piece 0"):
        prove(tokenizer, other, same, TEXT, lossless=True)
    # Without the promise it need only read back what it could before.
    with pytest.raises(VerificationError, match="reads back"):
        prove(tokenizer, other, same, TEXT, lossless=False)


def test_the_probes_are_read_back_from_bytes(tokenizer: Tokenizer) -> None:
    for probe in PROBES:
        assert tokenizer.decode(tokenizer.encode(probe).ids, skip_special_tokens=False) == probe
