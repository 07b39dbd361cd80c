"""Training windows: how many, from where, and that nothing is trained on and validated on at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compress.core.errors import DataError, UsageError
from compress.core.run import TrainingSource
from compress.data import training


class Words:
    """One token a word: its number; 1 begins a text and 2 ends it."""

    eos_token_id = 2
    sep_token_id = None
    cls_token_id = None

    def __init__(self, *, begins: bool = False) -> None:
        self._begins = begins

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool = True) -> list[int]:
        words = [0 if word == "a" else int(word) for word in text.split()]
        return [1, *words] if add_special_tokens and self._begins else words


def numbers(count: int, start: int = 10) -> str:
    return " ".join(str(start + at) for at in range(count))


def draw(source: TrainingSource, tokenizer: Any = None, seed: int = 0, **asked: Any) -> training.TrainingText:
    wanted = {"windows": 8, "held_out": 2, "length": 10, **asked}
    return training.draw(source, tokenizer or Words(), seed, 1_000_000, **wanted)


def test_a_short_text_is_taken_whole_and_parted(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(numbers(205))
    drawn = draw(TrainingSource(str(file)), windows=50, held_out=5)
    assert drawn.windows.shape == (18, 10)
    assert drawn.held_out.shape == (2, 10), "a tenth, and no more"
    seen = torch.cat([drawn.windows, drawn.held_out]).flatten().tolist()
    assert sorted(seen) == list(range(10, 210))
    again = draw(TrainingSource(str(file)), windows=50, held_out=5)
    assert again.windows.equal(drawn.windows)
    assert not draw(TrainingSource(str(file)), seed=1, windows=50, held_out=5).windows.equal(drawn.windows)
    assert "18 windows of 10 tokens" in drawn.description


def test_documents_are_parted_by_the_end_of_text(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("<|endoftext|>".join(numbers(4, 10 * at) for at in range(1, 9)))
    drawn = draw(TrainingSource(str(file)), windows=7, held_out=1, length=5)
    for window in torch.cat([drawn.windows, drawn.held_out]).tolist():
        assert window[-1] == 2
        assert 2 not in window[:-1]


def test_a_long_text_is_drawn_from_at_random(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(numbers(20_000))
    drawn = draw(TrainingSource(str(file)))
    assert drawn.windows.shape == (8, 10)
    assert drawn.held_out.shape == (1, 10)
    seen = torch.cat([drawn.windows, drawn.held_out])
    assert len(seen.unique()) == 90
    assert (seen.diff(dim=1) == 1).all()
    assert int(seen.max()) > 1_000, "from all of the text"


def test_another_text_validates_and_nothing_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(numbers(100))
    (tmp_path / "other.txt").write_text(numbers(100, 500))
    drawn = draw(TrainingSource(str(tmp_path / "train.txt"), str(tmp_path / "other.txt")), windows=50)
    assert drawn.windows.shape == (10, 10)
    assert drawn.held_out.shape == (2, 10)
    assert int(drawn.held_out.min()) >= 500
    assert int(drawn.windows.max()) < 500


def test_a_tokenizer_that_begins_texts_begins_windows(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(numbers(90))
    drawn = draw(TrainingSource(str(file)), Words(begins=True), windows=50, held_out=1)
    seen = torch.cat([drawn.windows, drawn.held_out])
    assert seen.shape == (10, 10)
    assert (seen[:, 0] == 1).all()
    assert (seen[:, 1:] > 1).all()


def test_documents_that_are_kept_apart_each_have_their_opening(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("<|endoftext|>".join(numbers(4, 10 * at) for at in range(1, 19)))
    source = TrainingSource(str(file))
    assert draw(source, Words(begins=True), windows=50, held_out=1).end is None
    drawn = draw(source, Words(begins=True), windows=50, held_out=1, apart=True)
    assert drawn.end == 2
    assert "documents apart" in drawn.description
    seen = torch.cat([drawn.windows, drawn.held_out])
    assert seen.shape == (10, 10)
    assert (seen[:, 0] == 1).all()
    for window in seen.tolist():
        inside = [window[at + 1] for at, token in enumerate(window[:-1]) if token == 2]
        assert inside
        assert set(inside) == {1}
        runs = " ".join("|" if token in (1, 2) else str(token) for token in window).split("|")
        for words in (run.split() for run in runs):
            assert (
                [int(word) for word in words] == list(range(int(words[0]), int(words[-1]) + 1))
                if words
                else 1
            )
    plain = draw(source, windows=50, held_out=1, apart=True)
    joined = draw(source, windows=50, held_out=1)
    assert plain.windows.equal(joined.windows), "without an opening they are the same tokens"


def test_documents_without_an_end_cannot_be_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(numbers(100))
    monkeypatch.setattr(Words, "eos_token_id", None)
    with pytest.raises(DataError, match="a tokenizer without one"):
        draw(TrainingSource(str(file)), apart=True)
    with pytest.raises(DataError, match="no tokenizer"):
        training.draw(TrainingSource(str(file)), None, 0, 100, windows=1, held_out=1, length=5, apart=True)


def test_a_built_in_text_is_read_in_the_splits_that_are_for_this(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(training.corpora, "check", asked.append)
    training.check(TrainingSource("builtin:stories"))
    training.check(TrainingSource("some.txt", "builtin:stories"))
    training.check(TrainingSource("builtin:stories/train"))
    assert asked == [
        "builtin:stories/train",
        "builtin:stories/validation",
        "some.txt",
        "builtin:stories/validation",
        "builtin:stories/train",
    ]


def test_tokens_are_taken_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "tokens.safetensors"
    save_file({"input_ids": torch.arange(60).view(6, 10)}, file)
    source = TrainingSource(str(file))
    assert not training.needs_tokenizer(source)
    drawn = training.draw(source, None, 0, 100, windows=50, held_out=4, length=10)
    assert (len(drawn.windows), len(drawn.held_out)) == (5, 1)
    with pytest.raises(DataError, match="windows of 10 tokens, wanted 12"):
        training.draw(source, None, 0, 100, windows=5, held_out=4, length=12)
    with pytest.raises(DataError, match="tokenizer does not fit"):
        training.draw(source, None, 0, 50, windows=5, held_out=4, length=10)


def test_what_cannot_be_trained_on_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(numbers(15))
    with pytest.raises(DataError, match="one window of 10 tokens, and one has to be held out"):
        draw(TrainingSource(str(file)))
    file.write_text(numbers(5))
    with pytest.raises(DataError, match="gives 6 tokens, one window needs 10"):
        draw(TrainingSource(str(file)))
    file.write_text("1000001 " * 50)
    with pytest.raises(DataError, match=r"tokenizer does not fit.*gives token 1000001"):
        draw(TrainingSource(str(file)))
    with pytest.raises(UsageError, match="no room to predict"):
        draw(TrainingSource(str(file)), length=1)
    with pytest.raises(DataError, match="has no tokenizer"):
        training.draw(TrainingSource(str(file)), None, 0, 100, windows=1, held_out=1, length=5)
    for tensors in ({"other": torch.zeros(2, 2)}, {"input_ids": torch.zeros(4, dtype=torch.int64)}):
        save_file(tensors, tmp_path / "tokens.safetensors")
        with pytest.raises(DataError, match="input_ids"):
            training.check(TrainingSource(str(tmp_path / "tokens.safetensors")))
    with pytest.raises(DataError, match="no text at"):
        training.check(TrainingSource(str(file), str(tmp_path / "absent.txt")))


def test_the_digest_is_that_of_the_contents(tmp_path: Path) -> None:
    for name, content in (("one", "1 2 3"), ("two", "1 2 3"), ("three", "4")):
        (tmp_path / f"{name}.txt").write_text(content)
    one, two, three = (str(tmp_path / f"{name}.txt") for name in ("one", "two", "three"))
    digest = training.digest_of_source
    assert digest(TrainingSource(one)) == digest(TrainingSource(two))
    assert (
        len({digest(TrainingSource(one)), digest(TrainingSource(three)), digest(TrainingSource(one, two))})
        == 3
    )


def test_an_order_is_a_permutation_that_its_name_determines() -> None:
    order = training.permutation("name", 100)
    assert sorted(order) == list(range(100))
    assert training.permutation("name", 100) == order != training.permutation("other", 100)
    # The numbers themselves: another version of Python must not shuffle otherwise.
    assert training.permutation("epoch", 8) == [0, 6, 5, 7, 4, 2, 1, 3]
