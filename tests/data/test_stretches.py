"""A whole text in parts: nothing is lost, nothing is cut inside a word."""

import itertools
import json
from pathlib import Path

from compress.data.stretches import stretches


def test_short_documents_stay_whole(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one two<|endoftext|>three, four", encoding="utf-8")
    assert list(stretches(str(file))) == ["one two", "three, four"]
    records = tmp_path / "text.jsonl"
    records.write_text("\n".join(json.dumps({"text": text}) for text in ("a b", "c")), encoding="utf-8")
    assert list(stretches(str(records))) == ["a b", "c"]


def test_a_long_document_is_cut_before_a_space_between_words(tmp_path: Path) -> None:
    text = " ".join(f"word{number}. Then, on the" for number in range(200))
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    parts = list(stretches(str(file), 100))
    assert "".join(parts) == text
    assert len(parts) > 20
    assert all(len(part) <= 100 for part in parts)
    for before, after in itertools.pairwise(parts):
        assert before[-1].isalnum()
        assert after[0] == " "
        assert after[1].isalnum()


def test_a_text_without_spaces_between_words_is_not_cut(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("漢字" * 500 + "\n\n- . -", encoding="utf-8")
    (part,) = stretches(str(file), 100)
    assert part == "漢字" * 500 + "\n\n- . -"


def test_the_first_place_behind_the_length_is_taken_where_there_is_none_before(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("x" * 150 + " y" + "z" * 20, encoding="utf-8")
    assert list(stretches(str(file), 100)) == ["x" * 150, " y" + "z" * 20]
