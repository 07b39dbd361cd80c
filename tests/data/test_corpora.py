"""Texts are read the same way whatever they come in, and what is no text is refused by its place."""

import gzip
import itertools
import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.core.errors import DataError, EnvironmentFault, UsageError
from compress.data import bytestreams, corpora
from compress.data.builtin import texts
from compress.data.builtin.splits import Split
from compress.data.hub import HubName


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


def test_the_separator_parts_documents_and_empty_ones_are_dropped(tmp_path: Path) -> None:
    text = "<|endoftext|>\n one\ntwo \n<|endoftext|>  \n <|endoftext|>three<|endoftext|>"
    found = corpora.documents(write(tmp_path / "a.txt", text))
    assert found.texts == ["one\ntwo", "three"]
    assert found.records is None
    assert found.description == "a.txt (2 documents, 12 characters)"


def test_a_text_without_separator_is_one_document(tmp_path: Path) -> None:
    assert corpora.documents(write(tmp_path / "a.txt", "\n a\n\nb\n")).texts == ["a\n\nb"]


def test_the_digest_is_of_the_contents_and_not_of_the_path_or_the_packing(tmp_path: Path) -> None:
    plain = corpora.documents(write(tmp_path / "a.txt", "x<|endoftext|>y"))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"x<|endoftext|>y"))
    packed = corpora.documents(str(tmp_path / "b.txt.gz"))
    other = corpora.documents(write(tmp_path / "c.txt", "xy"))
    assert plain.digest == packed.digest
    assert plain.texts == packed.texts
    assert other.digest != plain.digest


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    body = b"x<|endoftext|>" * 3 + b"y" * (3 * bytestreams.CHUNK_BYTES) + b"\0"
    (tmp_path / "a.txt").write_bytes(body)
    assert corpora.documents(str(tmp_path / "a.txt"), limit=2).texts == ["x", "x"]
    with pytest.raises(UsageError, match="limit"):
        corpora.documents(str(tmp_path / "a.txt"), limit=0)


@given(
    st.lists(st.text("ab <|endoftx>\né", max_size=30), max_size=8),
    st.integers(min_value=1, max_value=17),
)
def test_the_size_of_chunks_does_not_show(parts: list[str], size: int) -> None:
    text = corpora.SEPARATOR.join(parts)
    expected = [part.strip() for part in text.split(corpora.SEPARATOR) if part.strip()]
    chunks = [text[at : at + size] for at in range(0, len(text), size)]
    assert list(corpora._joined(corpora._split(iter(chunks)))) == expected


@given(st.text("a\n\r\u2028é", max_size=50), st.integers(min_value=1, max_value=9))
def test_lines_end_at_line_feeds_alone(
    tmp_path_factory: pytest.TempPathFactory, text: str, size: int
) -> None:
    file = tmp_path_factory.mktemp("lines") / "a.txt"
    file.write_text(text + "x", encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bytestreams, "CHUNK_BYTES", size)
        found = list(bytestreams.lines(file))
    assert "".join(found) == text + "x"
    assert all(line.count("\n") == (0 if at == len(found) - 1 else 1) for at, line in enumerate(found))


def test_json_lines_keep_their_records(tmp_path: Path) -> None:
    rows = [{"text": " a ", "label": 1}, {"text": "", "label": 2}, {"text": "b", "label": 3}]
    found = corpora.documents(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n"))
    assert found.texts == ["a", "b"]
    assert found.records == [rows[0], rows[2]]


def test_a_field_is_named_after_a_colon_and_fields_are_joined_by_plus(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", json.dumps({"context": "the ", "continuation": "end"}))
    assert corpora.documents(source).texts == ["the"]
    assert corpora.documents(source + ":continuation").texts == ["end"]
    assert corpora.documents(source + ":context+continuation").texts == ["the end"]
    with pytest.raises(DataError, match=r"line 1 has no field 'contxt'.*did you mean 'context'"):
        corpora.documents(source + ":contxt")


def test_a_file_whose_name_holds_a_colon_is_that_file(tmp_path: Path) -> None:
    assert corpora.documents(write(tmp_path / "a.jsonl:b", "plain")).texts == ["plain"]


def test_a_field_of_plain_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="plain text"):
        corpora.documents(write(tmp_path / "a.txt", "x") + ":text")


def test_tables_name_their_columns(tmp_path: Path) -> None:
    found = corpora.documents(write(tmp_path / "a.tsv", 'sentence\tlabel\nit "is\t1\r\nno\t0\n'))
    assert found.texts == ['it "is', "no"]
    assert found.records == [{"sentence": 'it "is', "label": "1"}, {"sentence": "no", "label": "0"}]
    with pytest.raises(DataError, match="line 2 has 3 columns"):
        corpora.documents(write(tmp_path / "b.tsv", "text\tlabel\na\tb\tc\n"))
    with pytest.raises(DataError, match="does not name its columns"):
        corpora.documents(write(tmp_path / "c.tsv", "gj04\t1\t\tThe sailors\n"))


def test_the_cells_of_a_csv_may_be_quoted(tmp_path: Path) -> None:
    text = 'text,label\n"a, ""b""\nc",1\n\nplain,0\n'
    found = corpora.documents(write(tmp_path / "a.csv", text))
    assert found.texts == ['a, "b"\nc', "plain"]
    assert found.records == [{"text": 'a, "b"\nc', "label": "1"}, {"text": "plain", "label": "0"}]
    with pytest.raises(DataError, match="line 2 has 3 columns"):
        corpora.documents(write(tmp_path / "b.csv", "text,label\na,b,c\n"))
    with pytest.raises(DataError, match="line 2 is no row of a table"):
        corpora.documents(write(tmp_path / "c.csv", 'text,label\n"a" b,c\n'))


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "is empty"),
        (b" \n<|endoftext|>\n", "holds no text"),
        (b"ab\0c", "NUL byte at 2"),
        (b"abc\xff", "not UTF-8: invalid start byte at byte 3"),
        ("abé".encode()[:-1], "not UTF-8: unexpected end of data at byte 2"),
    ],
)
def test_what_is_no_text_is_refused_by_its_byte(tmp_path: Path, body: bytes, complaint: str) -> None:
    (tmp_path / "a.txt").write_bytes(body)
    with pytest.raises(DataError, match=complaint):
        corpora.documents(str(tmp_path / "a.txt"))


def test_the_byte_is_counted_over_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bytestreams, "CHUNK_BYTES", 4)
    (tmp_path / "a.txt").write_bytes("aaaéaéé".encode() + b"\xc3(")
    with pytest.raises(DataError, match="at byte 10"):
        corpora.documents(str(tmp_path / "a.txt"))
    (tmp_path / "b.txt").write_bytes(b"aaaaaaaaa\0")
    with pytest.raises(DataError, match="NUL byte at 9"):
        corpora.documents(str(tmp_path / "b.txt"))


def test_damaged_gzip_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(os.urandom(3000).hex().encode())
    for name, body in {
        "cut": whole[: len(whole) // 2],
        "plain": b"no gzip at all",
        "flipped": whole[:500] + bytes([whole[500] ^ 0xFF]) + whole[501:],
    }.items():
        (tmp_path / f"{name}.txt.gz").write_bytes(body)
        with pytest.raises(DataError, match=r"damaged gzip|not UTF-8|NUL"):
            corpora.documents(str(tmp_path / f"{name}.txt.gz"))


def test_a_line_that_does_not_parse_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 3 is not JSON"):
        corpora.documents(write(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"text": \n'))
    with pytest.raises(DataError, match=r"line 1 holds list, expected an object.*jq"):
        corpora.documents(write(tmp_path / "b.json", '[{"text": "a"}]'))
    with pytest.raises(DataError, match=r"one JSON array"):
        corpora.documents(write(tmp_path / "c.json", '[\n{"text": "a"}\n]'))
    with pytest.raises(DataError, match="field 'text' is int, expected a string"):
        corpora.documents(write(tmp_path / "d.jsonl", '{"text": 3}') + ":text")
    with pytest.raises(DataError, match=r"no field 'text', but body, title.*d.jsonl:body"):
        corpora.documents(write(tmp_path / "d.jsonl", '{"title": "a", "body": "b"}'))
    with pytest.raises(DataError, match="surrogate"):
        corpora.documents(write(tmp_path / "e.jsonl", '{"text": "\\ud83d"}'))


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "stories.txt", "x")
    with pytest.raises(DataError, match=r"no text at .*story.txt.*did you mean .*stories.txt"):
        corpora.documents(str(tmp_path / "story.txt"))
    with pytest.raises(DataError, match=r"there is no folder"):
        corpora.documents(str(tmp_path / "nowhere" / "story.txt"))
    with pytest.raises(DataError, match="is a folder"):
        corpora.documents(str(tmp_path))


def test_a_pipe_is_refused_because_it_can_be_read_only_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="pipe"):
        corpora.documents(str(tmp_path / "pipe.txt"))


def test_builtin_texts_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UsageError, match="no built-in text is called 'nonsense'"):
        corpora.documents("builtin:nonsense")


def test_a_built_in_text_is_read_split_by_split() -> None:
    found = corpora.documents("builtin:stories", limit=3)
    assert found.texts == list(itertools.islice(texts.text(Split.TEST), 3))
    assert found.records is None
    assert found.description.startswith("builtin:stories/test (3 documents, ")
    named = corpora.documents("builtin:stories/validation", limit=3)
    assert named.texts == list(itertools.islice(texts.text(Split.VALIDATION), 3))
    parts = list(itertools.islice(corpora.pieces("builtin:stories/validation"), 3))
    assert parts == [corpora.Piece(text, last=True) for text in named.texts]
    assert corpora.file_of("builtin:stories") is None
    corpora.check("builtin:stories")
    with pytest.raises(UsageError, match=r"no split 'calibraton'.*did you mean 'calibration'"):
        corpora.check("builtin:stories/calibraton")


def test_the_split_of_a_built_in_text_follows_from_its_use() -> None:
    assert corpora.in_split("builtin:stories", Split.TRAIN) == "builtin:stories/train"
    assert corpora.in_split("builtin:stories/test", Split.TRAIN) == "builtin:stories/test"
    assert corpora.in_split("stories.txt", Split.TRAIN) == "stories.txt"


@pytest.mark.usefixtures("short_stories")
def test_the_content_digest_of_a_built_in_text_is_of_its_split() -> None:
    whole = corpora.content_digest("builtin:stories")
    assert whole == corpora.content_digest("builtin:stories/test")
    assert whole == corpora.documents("builtin:stories/test").digest
    assert whole != corpora.content_digest("builtin:stories/validation")


def test_hub_names() -> None:
    assert HubName.parse("hf:a/b") == HubName("a/b")
    assert HubName.parse("a/b:c::d") == HubName("a/b", "c", "", "d")
    assert HubName.parse("hf:a:c:train[:1%]:d") == HubName("a", "c", "train[:1%]", "d")
    for wrong in ("hf:", "hf::x", "hf:a:b:c:d:e"):
        with pytest.raises(UsageError, match=r"hf:NAME\[:CONFIG\]"):
            HubName.parse(wrong)


def test_a_missing_package_is_a_fault_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentFault, match="pip install datasets"):
        corpora.documents("hf:anyone/anything")


def test_the_content_digest_knows_content_and_field(tmp_path: Path) -> None:
    row = json.dumps({"text": "a", "other": "b"})
    first = write(tmp_path / "a.jsonl", row)
    second = write(tmp_path / "b.jsonl", row)
    third = write(tmp_path / "c.jsonl", row + "\n" + row)
    assert corpora.content_digest(first) == corpora.content_digest(second)
    assert corpora.content_digest(first) != corpora.content_digest(third)
    assert corpora.content_digest(first) != corpora.content_digest(first + ":other")
    with pytest.raises(DataError, match="no text at"):
        corpora.content_digest(str(tmp_path / "missing.txt"))


def test_check_reads_the_beginning_only(tmp_path: Path) -> None:
    body = b"x" * (2 * bytestreams.CHUNK_BYTES) + b"\0"
    (tmp_path / "late.txt").write_bytes(body)
    corpora.check(str(tmp_path / "late.txt"))
    (tmp_path / "early.txt").write_bytes(b"\0" + body)
    with pytest.raises(DataError, match="NUL"):
        corpora.check(str(tmp_path / "early.txt"))
    with pytest.raises(DataError, match="no text"):
        corpora.check(write(tmp_path / "blank.txt", " \n"))
