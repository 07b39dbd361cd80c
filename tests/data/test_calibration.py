"""Drawn windows: equal in length, disjoint, the same for the same seed, framed for encoders alone."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from compress.core.errors import DataError, UsageError
from compress.core.run import CalibrationSource
from compress.data import calibration, corpora
from compress.data.calibration import Frame, digest_of_source, draw
from compress.data.corpora import Piece


@dataclass
class Letters:
    """One token a character, its code point; 1 ends a text."""

    eos_token_id: int | None = 1
    sep_token_id: int | None = None
    cls_token_id: int | None = None
    encoded: int = 0

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool = True) -> list[int]:
        self.encoded += len(text)
        return [2] * add_special_tokens + [ord(letter) for letter in text]


def numbered(path: Path, words: int) -> str:
    """A text whose every word says where it stands: `00000000 00000001 ...`."""
    path.write_text(" ".join(f"{at:08d}" for at in range(words)))
    return str(path)


def source(text: str, samples: int = 4, length: int = 18) -> CalibrationSource:
    return CalibrationSource(text, samples=samples, sequence_length=length)


def starts(tokens: torch.Tensor) -> list[int]:
    """Where in a numbered text each window starts, in characters."""
    found = []
    for row in tokens.tolist():
        text = "".join(map(chr, row))
        at = text.index(" ")
        found.append(int(text[at + 1 : at + 9]) * 9 - 1 - at)
    return found


@pytest.mark.parametrize("words", [10, 17, 40, 5000])
def test_windows_are_cut_from_the_text_and_never_overlap(tmp_path: Path, words: int) -> None:
    text = numbered(tmp_path / "a.txt", words)
    drawn = draw(source(text), Letters(), 0, 128)
    assert drawn.tokens.shape == (4, 18)
    assert drawn.tokens.dtype == torch.int64
    whole = Path(text).read_text()
    windows = ["".join(map(chr, row)) for row in drawn.tokens.tolist()]
    places = sorted(starts(drawn.tokens))
    assert all(window in whole for window in windows)
    assert all(after - before >= 18 for before, after in itertools.pairwise(places))


def test_a_seed_draws_the_same_windows_again_and_another_seed_others(tmp_path: Path) -> None:
    for words in (40, 5000):
        text = numbered(tmp_path / "a.txt", words)
        first, again, other = (draw(source(text), Letters(), seed, 128) for seed in (0, 0, 1))
        assert torch.equal(first.tokens, again.tokens)
        assert first.digest == again.digest
        assert first.digest != other.digest
        assert first.description == "a.txt: 4 windows of 18 tokens, seed 0"


@pytest.mark.usefixtures("short_stories")
def test_a_built_in_text_gives_its_calibration_split() -> None:
    drawn = draw(source("builtin:stories", samples=2, length=60), Letters(), 0, 128)
    named = draw(source("builtin:stories/calibration", samples=2, length=60), Letters(), 0, 128)
    other = draw(source("builtin:stories/train", samples=2, length=60), Letters(), 0, 128)
    assert torch.equal(drawn.tokens, named.tokens)
    assert not torch.equal(drawn.tokens, other.tokens)
    assert drawn.description == "builtin:stories/calibration: 2 windows of 60 tokens, seed 0"
    texts = corpora.documents("builtin:stories/calibration").texts
    joined = chr(1).join(texts)
    assert all("".join(map(chr, row)) in joined for row in drawn.tokens.tolist())


@pytest.mark.usefixtures("short_stories")
def test_the_key_of_a_built_in_text_is_that_of_its_split(tmp_path: Path) -> None:
    digests = [
        digest_of_source(source(f"builtin:stories{split}"), tmp_path, 0)
        for split in ("", "/calibration", "/test")
    ]
    assert digests[0] == digests[1] != digests[2]
    calibration.check(source("builtin:stories"))
    with pytest.raises(UsageError, match="no split"):
        calibration.check(source("builtin:stories/none"))


def test_a_draw_is_not_the_beginning_of_the_text(tmp_path: Path) -> None:
    text = numbered(tmp_path / "a.txt", 50_000)
    places = starts(draw(source(text, samples=64), Letters(), 0, 128).tokens)
    length = Path(text).stat().st_size
    assert places != sorted(places)
    assert min(places) < 0.1 * length
    assert max(places) > 0.9 * length
    assert 0.35 * length < sum(places) / len(places) < 0.65 * length


@given(st.lists(st.text("ab ", min_size=1, max_size=60), max_size=12), st.integers(1, 20))
def test_stretches_are_the_text_in_pieces_of_bounded_length(parts: list[str], width: int) -> None:
    texts = [text for part in parts if (text := part.strip())]
    pieces = [
        Piece(text[at : at + 7], at + 7 >= len(text)) for text in texts for at in range(0, len(text), 7)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "pieces", lambda source: iter(pieces))
        stretches = list(calibration._stretches("any", width))
    rebuilt: list[str] = []
    for before, stretch in zip([None, *stretches], stretches, strict=False):
        assert stretch.cut_before == (before is not None and before.cut_after)
        first, *others = stretch.texts
        if stretch.cut_before:
            rebuilt[-1] += first
        else:
            rebuilt.append(first)
        rebuilt += others
    assert rebuilt == texts
    sizes = [sum(map(len, stretch.texts)) for stretch in stretches]
    assert all(size < 2 * width for size in sizes)
    assert all(size >= width for size in sizes[:-1])


def test_of_a_long_text_only_what_is_needed_is_tokenized(tmp_path: Path) -> None:
    letters = Letters()
    draw(source(numbered(tmp_path / "a.txt", 50_000)), letters, 0, 128)
    assert letters.encoded < 4 * 2 * 18 * calibration.CHARACTERS_PER_TOKEN + 10


def test_exactly_enough_tokens_are_enough_and_one_less_is_too_few(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("x" * 72)
    assert draw(source(str(file)), Letters(), 0, 128).tokens.shape == (4, 18)
    file.write_text("x" * 71)
    with pytest.raises(DataError, match=r"gives 71 tokens, 4 samples of 18 need 72") as caught:
        draw(source(str(file)), Letters(), 0, 128)
    assert caught.value.hint == "it is enough for 3 samples of 18 or 4 samples of 17"
    assert draw(source(str(file), 3, 18), Letters(), 0, 128).tokens.shape == (3, 18)
    assert draw(source(str(file), 4, 17), Letters(), 0, 128).tokens.shape == (4, 17)


def test_tokens_longer_than_expected_make_the_stretches_longer(tmp_path: Path) -> None:
    class Sparse(Letters):
        def encode(self, text: str, *, add_special_tokens: bool, verbose: bool = True) -> list[int]:
            return super().encode(text, add_special_tokens=add_special_tokens)[::40]

    drawn = draw(source(numbered(tmp_path / "a.txt", 50_000)), Sparse(), 0, 128)
    assert drawn.tokens.shape == (4, 18)


def test_documents_are_parted_by_the_end_of_text_only_where_there_are_several(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("aaa<|endoftext|>bbb<|endoftext|>ccc")
    whole = source(str(file), 1, 11)
    assert draw(whole, Letters(), 0, 128).tokens.tolist() == [[97] * 3 + [1] + [98] * 3 + [1] + [99] * 3]
    unparted = draw(source(str(file), 1, 9), Letters(eos_token_id=None), 0, 128)
    assert unparted.tokens.tolist() == [[97] * 3 + [98] * 3 + [99] * 3]
    file.write_text("aaabbbccc")
    assert 1 not in draw(source(str(file), 1, 9), Letters(), 0, 128).tokens


def test_short_documents_fill_windows_together(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("<|endoftext|>".join(f"{at:05d}" for at in range(3000)))
    for row in draw(source(str(file), 8, 32), Letters(), 0, 128).tokens.tolist():
        parts = "".join(map(chr, row)).split("\1")
        assert len(parts) >= 5
        inner = [int(part) for part in parts[1:-1]]
        assert inner == list(range(inner[0], inner[0] + len(inner)))


def test_a_token_beyond_the_embedding_does_not_fit(tmp_path: Path) -> None:
    text = numbered(tmp_path / "a.txt", 40)
    with pytest.raises(DataError, match=r"tokenizer does not fit: .* gives token 57, .* 57 rows"):
        draw(source(text), Letters(), 0, 57)


@pytest.mark.parametrize(("samples", "length"), [(0, 4), (4, 0), (-1, 4)])
def test_numbers_that_make_no_window_are_refused(tmp_path: Path, samples: int, length: int) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        draw(source(numbered(tmp_path / "a.txt", 9), samples, length), Letters(), 0, 128)


def test_a_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer"):
        draw(source(numbered(tmp_path / "a.txt", 9)), None, 0, 128)


def fast(template: str | None, **special: str) -> PreTrainedTokenizerFast:
    words = ["[UNK]", "[CLS]", "[SEP]", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {word: at for at, word in enumerate(words)}
    inner = FastTokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    if template is not None:
        named = [(word, vocabulary[word]) for word in template.split() if word != "$A"]
        inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **special)


def test_windows_of_an_encoder_are_framed_as_its_tokenizer_does(tmp_path: Path) -> None:
    encoder = fast("[CLS] $A [SEP]", cls_token="[CLS]", sep_token="[SEP]")
    assert Frame.of(encoder) == Frame((1,), (2,), (2,))
    file = tmp_path / "a.txt"
    file.write_text("abcdefgh")
    drawn = draw(source(str(file), 2, 6), encoder, 0, 31)
    assert drawn.tokens[:, 0].tolist() == [1, 1]
    assert drawn.tokens[:, -1].tolist() == [2, 2]
    assert sorted(drawn.tokens[:, 1:-1].flatten().tolist()) == list(range(5, 13))
    with pytest.raises(UsageError, match="at least 3"):
        draw(source(str(file), 2, 2), encoder, 0, 31)
    with pytest.raises(DataError) as caught:
        draw(source(str(file), 3, 6), encoder, 0, 31)
    assert caught.value.hint == "it is enough for 2 samples of 6 or 3 samples of 4"


@pytest.mark.parametrize("template", [None, "<s> $A", "<s> $A </s>"])
def test_windows_of_a_causal_model_hold_no_beginning(template: str | None) -> None:
    causal = fast(template, bos_token="<s>", eos_token="</s>")
    assert Frame.of(causal) == Frame(between=(4,))


def test_tokens_of_a_file_are_taken_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "draw.safetensors"
    tokens = torch.arange(12, dtype=torch.int32).view(3, 4)
    save_file({"input_ids": tokens}, file)
    drawn = draw(source(str(file), 2, 4), None, 0, 128)
    assert torch.equal(drawn.tokens, tokens[:2].long())
    assert drawn.tokens.dtype == torch.int64
    assert drawn.description == "draw.safetensors: 2 windows of 4 tokens"
    calibration.check(source(str(file), 3, 4))
    for samples, length in ((4, 4), (2, 3), (2, 5)):
        with pytest.raises(DataError, match=rf"3 windows of 4 tokens, wanted {samples} of {length}"):
            draw(source(str(file), samples, length), None, 0, 128)
    with pytest.raises(DataError, match="tokenizer does not fit"):
        draw(source(str(file), 3, 4), None, 0, 11)


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"ids": torch.ones(2, 4, dtype=torch.int64)}, "no tensor 'input_ids'"),
        ({"input_ids": torch.ones(4, dtype=torch.int64)}, r"shape \[4\]"),
        ({"input_ids": torch.ones(2, 4)}, "expected integers"),
    ],
)
def test_files_that_hold_no_tokens_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], complaint: str
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=complaint):
        draw(source(str(tmp_path / "a.safetensors"), 2, 4), None, 0, 128)


def test_a_damaged_file_of_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\0" * 5)
    with pytest.raises(DataError, match="not a sound safetensors file"):
        draw(source(str(tmp_path / "a.safetensors")), None, 0, 128)
    with pytest.raises(DataError, match="no text at"):
        draw(source(str(tmp_path / "b.safetensors")), None, 0, 128)


def test_the_identity_of_a_source_knows_everything_that_changes_the_batches(tmp_path: Path) -> None:
    text = numbered(tmp_path / "a.txt", 9)
    copy = numbered(tmp_path / "b.txt", 9)
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_text("{}")
    base = digest_of_source(CalibrationSource(text), model, 0)
    assert digest_of_source(CalibrationSource(copy), model, 0) == base
    (model / "README.md").write_text("a card")
    assert digest_of_source(CalibrationSource(text), model, 0) == base
    others = [
        digest_of_source(CalibrationSource(text), model, 1),
        digest_of_source(CalibrationSource(text, samples=127), model, 0),
        digest_of_source(CalibrationSource(text, sequence_length=511), model, 0),
        digest_of_source(CalibrationSource(text, batch_size=7), model, 0),
        digest_of_source(CalibrationSource(numbered(tmp_path / "c.txt", 10)), model, 0),
    ]
    (model / "tokenizer.json").write_text("{ }")
    others.append(digest_of_source(CalibrationSource(text), model, 0))
    assert len({base, *others}) == 7


def test_the_seed_does_not_change_the_identity_of_tokens_in_a_file(tmp_path: Path) -> None:
    save_file({"input_ids": torch.ones(2, 4, dtype=torch.int64)}, tmp_path / "a.safetensors")
    text = str(tmp_path / "a.safetensors")
    assert digest_of_source(source(text), tmp_path, 0) == digest_of_source(source(text), tmp_path, 1)


def test_real_text_decodes_to_passages_of_it(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/gutenberg-4m")
    file = shared / "data/tinyshakespeare.txt"
    drawn = draw(source(str(file), 4, 64), tokenizer, 0, 4096)
    text = file.read_text()
    for row in drawn.tokens:
        assert tokenizer.decode(row) in text
