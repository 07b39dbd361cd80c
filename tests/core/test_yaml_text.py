"""YAML with lines, without surprises."""

from typing import Any

import pytest

from compress.core.errors import UsageError
from compress.core.yaml_text import dump, line_of, parse, value_of

TEXT = "a: 1\nb:\n  - c: 2\n  - {c: 3, d: 4}\n"


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("a",), 1),
        (("b",), 2),
        (("b", 0, "c"), 3),
        (("b", 1), 4),
        (("b", 1, "d"), 4),
        (("b", 1, "absent"), 4),
        (("b", 7), 2),
        (("absent",), None),
        ((), None),
    ],
)
def test_an_entry_has_its_line_or_that_of_what_holds_it(
    path: tuple[int | str, ...], line: int | None
) -> None:
    tree, document = parse(TEXT, "t")
    assert document == {"a": 1, "b": [{"c": 2}, {"c": 3, "d": 4}]}
    assert line_of(tree, path) == line


def test_an_empty_text_is_an_empty_mapping() -> None:
    assert parse("# nothing\n", "t") == (None, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2", "t:2: not YAML"),
        ("a: 1\na: 2", "t:2: not YAML: the key 'a' is given twice"),
        ("a: {b: 1, b: 2}", "t:1: not YAML: the key 'b' is given twice"),
        ("a: !!python/name:os.system", "t:1: not YAML"),
        ("a: \x00", "t: not YAML: special characters are not allowed"),
        ("--- 1\n--- 2", "t:2: not YAML: but found another document"),
    ],
)
def test_what_is_no_yaml_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text, "t")
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("0.5", 0.5), ("yes", True), ("channel", "channel"), ("*.down", "*.down"), ("null", None)],
)
def test_a_value_is_typed_or_text(text: str, value: Any) -> None:
    assert value_of(text) == value


def test_dumping_keeps_the_order() -> None:
    assert dump({"b": 1, "a": [{"d": 2, "c": 3}]}) == "b: 1\na:\n- d: 2\n  c: 3\n"
