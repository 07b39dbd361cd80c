"""Suites are recognised by their keys, and a line that does not fit is an error that says where."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from compress.core.errors import DataError, UsageError
from compress.data.suites import (
    Classification,
    Cloze,
    Generation,
    MultipleChoice,
    QuestionAnswering,
    Shape,
    chance_level,
    read_suite,
    shape_of,
    suite_name,
)
from tests.scored_suites import write

GOOD: dict[Shape, tuple[dict[str, Any], Any]] = {
    Shape.MULTIPLE_CHOICE: (
        {"query": "Q?\n", "choices": ["a", "b "], "gold": 1},
        MultipleChoice("Q?\n", ("a", "b "), 1),
    ),
    Shape.CLOZE: ({"context": "", "continuation": " x"}, Cloze("", " x")),
    Shape.CLASSIFICATION: ({"text": "t", "label": "good"}, Classification("t", "good")),
    Shape.QUESTION_ANSWERING: (
        {"question": "q", "context": "c", "answers": ["a"]},
        QuestionAnswering("q", "c", ("a",)),
    ),
    Shape.GENERATION: ({"source": "s", "reference": "r"}, Generation("s", "r")),
}


@pytest.mark.parametrize("shape", Shape)
def test_the_keys_say_which_kind_it_is(shape: Shape, tmp_path: Path) -> None:
    record, example = GOOD[shape]
    suite = read_suite(write(tmp_path / "my.suite.jsonl", [{**record, "id": 7}] * 3))
    assert suite.shape is shape
    assert suite.examples == (example,) * 3
    assert suite.name == "my-suite"
    assert shape_of(str(tmp_path / "my.suite.jsonl")) is shape


def test_the_digest_is_of_the_examples_alone(tmp_path: Path) -> None:
    record = GOOD[Shape.MULTIPLE_CHOICE][0]
    plain = read_suite(write(tmp_path / "one.jsonl", [record, record]))
    other = tmp_path / "two.jsonl.gz"
    turned = json.dumps({"id": 1, **dict(reversed(record.items()))})
    other.write_bytes(gzip.compress(f"{turned}\n\n{turned}".encode()))
    assert read_suite(other).digest == plain.digest
    assert read_suite(other, limit=1).digest != plain.digest
    assert len(read_suite(other, limit=1).examples) == 1
    changed = write(tmp_path / "three.jsonl", [record, {**record, "gold": 0}])
    assert read_suite(changed).digest != plain.digest


CHOICE = GOOD[Shape.MULTIPLE_CHOICE][0]
ANSWER = GOOD[Shape.QUESTION_ANSWERING][0]
LABEL = GOOD[Shape.CLASSIFICATION][0]


@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        (CHOICE, {**CHOICE, "gold": 2}, "gold is 2, expected the number of a choice, 0 to 1"),
        (CHOICE, {**CHOICE, "gold": True}, "gold is True"),
        (CHOICE, {**CHOICE, "gold": "1"}, "gold is '1'"),
        (CHOICE, {**CHOICE, "choices": ["a"]}, "a list of 1, expected a list of at least 2 strings"),
        (CHOICE, {**CHOICE, "choices": "ab"}, "choices is str"),
        (CHOICE, {**CHOICE, "choices": ["a", ""]}, "choices holds an empty string"),
        (CHOICE, {**CHOICE, "query": 3}, "query holds int, expected a string"),
        (CHOICE, {**CHOICE, "query": "\ud800"}, "half of a surrogate pair"),
        (CHOICE, {"query": "q", "choices": ["a", "b"]}, "has no 'gold', but query, choices"),
        (ANSWER, {**ANSWER, "answers": []}, "a list of 0"),
        (LABEL, {**LABEL, "label": 1.5}, "label is 1.5"),
        (LABEL, {**LABEL, "label": True}, "label is True"),
        (LABEL, [1], "holds list, expected an object"),
    ],
)
def test_a_bad_line_says_where_it_is(good: Any, bad: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_suite(write(tmp_path / "bad.jsonl", [good, bad]))
    assert "bad.jsonl line 2" in error.value.message
    assert words in error.value.message


def test_what_is_no_suite(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has the keys prompt, answer") as error:
        read_suite(write(tmp_path / "other.jsonl", [{"prompt": "p", "answer": "a"}]))
    assert "query, choices, gold (multiple-choice)" in error.value.hint
    array = tmp_path / "array.json"
    array.write_text('[{"text": "t", "label": 1},\n')
    with pytest.raises(DataError, match="line 1 is not JSON") as error:
        read_suite(array)
    assert "jq" in error.value.hint
    blank = tmp_path / "blank.jsonl"
    blank.write_text("\n\n")
    with pytest.raises(DataError, match="holds no example"):
        read_suite(blank)
    with pytest.raises(DataError, match="no text at"):
        read_suite(tmp_path / "missing.jsonl")
    with pytest.raises(UsageError, match="limit of examples is 0"):
        read_suite(blank, limit=0)


@pytest.mark.parametrize(
    ("records", "level"),
    [
        (
            [
                {"query": "q", "choices": ["a", "b"], "gold": 0},
                {"query": "q", "choices": [*"abcd"], "gold": 1},
            ],
            0.375,
        ),
        ([{"context": "c", "continuation": word} for word in ("x", "y", "x", "z")], 0.5),
        ([{"text": "t", "label": label} for label in (0, 1, 1)], 2 / 3),
        ([{"question": "q", "context": "", "answers": each} for each in (["a", "b"], ["b"], ["c"])], 2 / 3),
        ([{"source": "s", "reference": word} for word in ("x", "y")], 0.5),
    ],
)
def test_the_chance_level_is_that_of_who_has_not_read_the_examples(
    records: list[dict[str, Any]], level: float, tmp_path: Path
) -> None:
    assert chance_level(read_suite(write(tmp_path / "a.jsonl", records))) == pytest.approx(level)


def test_names_of_files_become_parts_of_quantities() -> None:
    assert suite_name("/a/b/arc_easy.jsonl.gz") == "arc_easy"
    assert suite_name("Größe 2.json") == "Gr-e-2"
    with pytest.raises(UsageError, match="no letter or digit"):
        suite_name("/a/….jsonl")


@pytest.mark.parametrize(
    ("name", "count", "shape"),
    [
        ("piqa", 1_838, Shape.MULTIPLE_CHOICE),
        ("arc_easy", 2_376, Shape.MULTIPLE_CHOICE),
        ("lambada_openai", 5_153, Shape.CLOZE),
    ],
)
def test_real_suites(name: str, count: int, shape: Shape, shared: Path) -> None:
    suite = read_suite(shared / "data" / "lm_tasks" / f"{name}.jsonl.gz")
    assert (suite.name, suite.shape, len(suite.examples)) == (name, shape, count)
