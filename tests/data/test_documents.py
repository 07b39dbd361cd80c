"""Documents as padded rows: labels, special tokens, pieces of long texts, and what is held out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compress.core.errors import DataError, UsageError
from compress.core.run import TrainingSource
from compress.data.documents import Reading, draw

CONFIG = {"label2id": {"bad": 0, "good": 1}}
OPEN, CLOSE = 1, 2


class Characters:
    """One token a character, between a token that opens a text and one that closes it."""

    eos_token_id = sep_token_id = CLOSE
    cls_token_id = OPEN

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool = True) -> list[int]:
        tokens = [ord(character) for character in text]
        return [OPEN, *tokens, CLOSE] if add_special_tokens else tokens


def reading(*, length: int = 8, classes: int | None = 2, vocabulary: int = 128) -> Reading:
    return Reading(Characters(), vocabulary, length, classes, CONFIG)


def lines(file: Path, *records: dict[str, Any]) -> TrainingSource:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return TrainingSource(str(file))


def spoken(rows: torch.Tensor) -> dict[str, int]:
    """The text of each row, without its frame, and its label."""
    found = {}
    for label, *tokens in rows.tolist():
        kept = [token for token in tokens if token >= 0]
        assert kept[0] == OPEN
        assert kept[-1] == CLOSE
        assert tokens == kept + [-1] * (len(tokens) - len(kept))
        found["".join(map(chr, kept[1:-1]))] = label
    return found


def test_documents_are_rows_with_labels_and_padding(tmp_path: Path) -> None:
    source = lines(
        tmp_path / "a.jsonl",
        {"text": "a", "label": "bad"},
        {"text": "bcd", "label": 1},
        {"text": "ef", "label": None},
        {"text": "g"},
        {"text": "h", "label": "good"},
    )
    drawn = draw(source, reading(), 0, rows=10, held_out=1)
    found = {**spoken(drawn.windows), **spoken(drawn.held_out)}
    assert found == {"a": 0, "bcd": 1, "ef": -1, "g": -1, "h": 1}
    assert drawn.windows.shape == (4, 6)
    assert drawn.windows.dtype is torch.int64
    # What is held out tells progress by its label.
    assert int(drawn.held_out[0, 0]) >= 0
    assert "a.jsonl: 4 documents (2 with a label)" in drawn.description
    again = draw(source, reading(), 0, rows=10, held_out=1)
    assert torch.equal(again.windows, drawn.windows)
    orders = {
        tuple(draw(source, reading(), seed, rows=10, held_out=1).windows[:, 2].tolist()) for seed in range(8)
    }
    assert len(orders) > 1


def test_without_classes_labels_are_left_alone(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", {"text": "a", "label": "wonderful"}, {"text": "b", "label": 7})
    drawn = draw(source, reading(classes=None), 0, rows=10, held_out=1)
    assert {**spoken(drawn.windows), **spoken(drawn.held_out)} == {"a": -1, "b": -1}
    assert "label" not in drawn.description


def test_a_long_document_is_cut_with_a_label_and_continued_without(tmp_path: Path) -> None:
    source = lines(
        tmp_path / "a.jsonl", {"text": "abcdefghijkl", "label": 1}, {"text": "nopqrstuvwxyz"}, {"text": "m"}
    )
    drawn = draw(source, reading(), 0, rows=10, held_out=1)
    found = {**spoken(drawn.windows), **spoken(drawn.held_out)}
    assert found == {"abcdef": 1, "nopqrs": -1, "tuvwxy": -1, "z": -1, "m": -1}


def test_a_running_text_is_cut_at_blanks_and_nothing_of_it_is_lost(tmp_path: Path) -> None:
    text = " ".join(f"word{number}" for number in range(300))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    drawn = draw(TrainingSource(str(tmp_path / "a.txt")), reading(length=32), 0, rows=1000, held_out=2)
    pieces = [*spoken(drawn.windows), *spoken(drawn.held_out)]
    assert sorted("".join(pieces)) == sorted(text)
    few = draw(TrainingSource(str(tmp_path / "a.txt")), reading(length=32), 0, rows=3, held_out=2)
    # At most a tenth of what was drawn is held out of it.
    assert (len(few.windows), len(few.held_out)) == (3, 1)


def test_tables_and_another_text_to_validate_on(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("sentence\tlabel\na b\t1\nc\t0\nd\t\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text('text,label\n"x, y",good\n', encoding="utf-8")
    source = TrainingSource(str(tmp_path / "a.tsv"), str(tmp_path / "b.csv"))
    drawn = draw(source, reading(), 0, rows=10, held_out=10)
    assert spoken(drawn.windows) == {"a b": 1, "c": 0, "d": -1}
    assert spoken(drawn.held_out) == {"x, y": 1}
    assert "validation on 1, b.csv" in drawn.description


def test_tokens_are_taken_as_they_are(tmp_path: Path) -> None:
    tokens = torch.arange(12).view(3, 4)
    save_file({"input_ids": tokens}, tmp_path / "a.safetensors")
    source = TrainingSource(str(tmp_path / "a.safetensors"))
    bare = Reading(None, 12, 8, None, {})
    drawn = draw(source, bare, 0, rows=10, held_out=1)
    both = torch.cat([drawn.windows, drawn.held_out])
    assert sorted(both[:, 1:].tolist()) == tokens.tolist()
    assert (both[:, 0] == -1).all()
    with pytest.raises(DataError, match="longer than 3"):
        draw(source, Reading(None, 12, 3, None, {}), 0, rows=10, held_out=1)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    one = lines(tmp_path / "one.jsonl", {"text": "a", "label": 0})
    with pytest.raises(DataError, match="one document"):
        draw(one, reading(), 0, rows=10, held_out=1)
    many = lines(tmp_path / "many.jsonl", {"text": "a", "label": 0}, {"text": "b", "label": 2})
    with pytest.raises(DataError, match="document 2: label 2, and the model knows 2 labels"):
        draw(many, reading(), 0, rows=10, held_out=1)
    odd = lines(tmp_path / "odd.jsonl", {"text": "a", "label": [0]}, {"text": "b", "label": 1})
    with pytest.raises(DataError, match=r"label is \[0\]"):
        draw(odd, reading(), 0, rows=10, held_out=1)
    with pytest.raises(DataError, match="tokenizer does not fit"):
        draw(many, reading(vocabulary=50, classes=3), 0, rows=10, held_out=1)
    with pytest.raises(UsageError, match="no room"):
        draw(many, reading(length=2), 0, rows=10, held_out=1)
    with pytest.raises(UsageError, match="must be 1 or more"):
        draw(many, reading(), 0, rows=0, held_out=1)
    with pytest.raises(DataError, match="no tokenizer"):
        draw(many, Reading(None, 12, 8, None, {}), 0, rows=10, held_out=1)


def test_half_of_few_labels_stay_to_be_learned_from(tmp_path: Path) -> None:
    records = [{"text": chr(97 + at), **({"label": 1} if at < 4 else {})} for at in range(20)]
    drawn = draw(lines(tmp_path / "a.jsonl", *records), reading(), 0, rows=100, held_out=100)
    assert (drawn.held_out[:, 0] == 1).all()
    assert len(drawn.held_out) == 2
    assert int((drawn.windows[:, 0] == 1).sum()) == 2
