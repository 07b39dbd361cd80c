"""Suites of examples with a known answer, read from JSON lines or built in.

One object a line, plain or ``.gz``. What kind of work a suite is follows from the keys of its lines:

- ``query``, ``choices``, ``gold``: multiple choice; ``gold`` is the number of the right choice, from 0;
- ``context``, ``continuation``: cloze, a text and how it goes on;
- ``text``, ``label``: classification; the label is a number or a name that the model's labels have;
- ``question``, ``context``, ``answers``: question answering; any one of the answers is right;
- ``source``, ``reference``: generation, a text and what should be made of it.

``builtin:tasks/NAME`` is a suite that ships with the package (`compress.data.builtin.tasks`), and
``builtin:tasks`` stands for all of them.

Other keys are left alone. Every line of a file is of the same kind, and a line that does not fit is an
error that says where it is: an example left out would change the score in silence.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Final

from compress.core.errors import DataError, UsageError
from compress.data.bytestreams import json_lines

_SUFFIXES: Final = (".gz", ".jsonl", ".json", ".ndjson")
_BUILTIN: Final = "builtin:"
_NOT_A_NAME: Final = re.compile(r"[^A-Za-z0-9_-]+")


class Shape(StrEnum):
    """Which kind of work a suite is."""

    MULTIPLE_CHOICE = "multiple-choice"
    CLOZE = "cloze"
    CLASSIFICATION = "classification"
    QUESTION_ANSWERING = "question-answering"
    GENERATION = "generation"


@dataclass(frozen=True)
class MultipleChoice:
    """A query, at least two choices, and the number of the right one."""

    shape: ClassVar[Shape] = Shape.MULTIPLE_CHOICE
    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Cloze:
    """A text and how it goes on."""

    shape: ClassVar[Shape] = Shape.CLOZE
    context: str
    continuation: str


@dataclass(frozen=True)
class Classification:
    """A text and its label, by number or by name."""

    shape: ClassVar[Shape] = Shape.CLASSIFICATION
    text: str
    label: int | str


@dataclass(frozen=True)
class QuestionAnswering:
    """A question, the text that it is about (or an empty one), and the answers that are right."""

    shape: ClassVar[Shape] = Shape.QUESTION_ANSWERING
    question: str
    context: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Generation:
    """A text and what should be made of it."""

    shape: ClassVar[Shape] = Shape.GENERATION
    source: str
    reference: str


Example = MultipleChoice | Cloze | Classification | QuestionAnswering | Generation


@dataclass(frozen=True)
class Suite:
    """The examples of a file, in its order.

    Attributes:
        name: of the file, without folder and suffixes; how quantities and gates call it.
        shape: which kind of work it is.
        examples: at least one, all of the class of `shape`.
        digest: SHA-256 of the examples; independent of the path, of compression and of other keys.
    """

    name: str
    shape: Shape
    examples: tuple[Example, ...]
    digest: str


def read_suite(source: str | Path, *, limit: int | None = None) -> Suite:
    """Read a suite.

    Args:
        source: a JSON lines file, or ``builtin:tasks/NAME``.
        limit: read no further than this many examples.

    Raises:
        DataError: it is missing, empty, damaged, or a line does not fit.
        EnvironmentFault: it may not be read.
        UsageError: the limit is no positive number, the file's name has no letter or digit, or there is
            no such built-in suite.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit of examples is {limit}, expected at least 1")
    digest = hashlib.sha256()
    examples: list[Example] = []
    kind: type[Example] | None = None
    for number, record in _records(source):
        where = f"{source} line {number}"
        kind = kind or _kind(record, where)
        example = _PARSERS[kind](record, where)
        examples.append(example)
        data = json.dumps({"shape": kind.shape, **asdict(example)}, sort_keys=True).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
        if len(examples) == limit:
            break
    if kind is None:
        raise DataError(f"{source} holds no example", _EXPECTED)
    return Suite(suite_name(source), kind.shape, tuple(examples), digest.hexdigest())


@cache
def shape_of(source: str) -> Shape:
    """Which kind of work a suite is, from its first line alone.

    Raises:
        DataError, EnvironmentFault: as `read_suite`.
    """
    return read_suite(source, limit=1).shape


def suite_name(source: str | Path) -> str:
    """How quantities call a suite: ``lm_tasks/piqa.jsonl.gz`` is ``piqa``.

    Raises:
        UsageError: nothing of the file's name can be part of a quantity's name.
    """
    name = Path(source).name
    while name.lower().endswith(_SUFFIXES):
        name = name[: name.rindex(".")]
    name = _NOT_A_NAME.sub("-", name).strip("-")
    if not name:
        raise UsageError(
            f"a suite is called after its file, and '{Path(source).name}' has no letter or digit",
            "rename the file",
        )
    return name


def expand(sources: Iterable[str]) -> tuple[str, ...]:
    """Suites one by one, where a name stands for several.

    Raises:
        UsageError: there is no such built-in suite.
    """
    found: list[str] = []
    for source in sources:
        if source.startswith(_BUILTIN):
            from compress.data.builtin import tasks

            found.extend(f"{tasks.NAME}/{name}" for name in tasks.named(source))
        else:
            found.append(source)
    return tuple(found)


def chance_level(suite: Suite) -> float:
    """The share of right answers of somebody who has not read the examples.

    For multiple choice, of a blind choice; for all other shapes, of the one answer that is right most
    often, given every time.
    """
    examples = suite.examples
    if suite.shape is Shape.MULTIPLE_CHOICE:
        blind = [1 / len(each.choices) for each in examples if isinstance(each, MultipleChoice)]
        return sum(blind) / len(examples)
    counts = Counter(answer for example in examples for answer in _right_answers(example))
    return max(counts.values()) / len(examples)


def _right_answers(example: Example) -> frozenset[str]:
    if isinstance(example, QuestionAnswering):
        return frozenset(example.answers)
    if isinstance(example, Cloze):
        return frozenset((example.continuation,))
    if isinstance(example, Classification):
        return frozenset((str(example.label),))
    if isinstance(example, Generation):
        return frozenset((example.reference,))
    return frozenset((example.choices[example.gold],))


def _records(source: str | Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if str(source).startswith(_BUILTIN):
        yield from enumerate(_builtin_records(str(source)), start=1)
        return
    file = Path(source).expanduser()
    for number, value in json_lines(file):
        if not isinstance(value, dict):
            raise DataError(
                f"{file} line {number} holds {type(value).__name__}, expected an object", _EXPECTED
            )
        yield number, value


def _builtin_records(source: str) -> Iterator[Mapping[str, Any]]:
    # Only here, because the problems of the built-in suites are made of this module's shapes.
    from compress.data.builtin import tasks

    names = tasks.named(source)
    if len(names) > 1:
        raise UsageError(f"{source} stands for several suites: {', '.join(names)}", "name one of them")
    return tasks.records(names[0])


def _kind(record: Mapping[str, Any], where: str) -> type[Example]:
    found = next((kind for kind, keys in _KEYS.items() if keys <= record.keys()), None)
    if found is None:
        raise DataError(f"{where} has the keys {', '.join(record) or 'none'}", _EXPECTED)
    return found


def _multiple_choice(record: Mapping[str, Any], where: str) -> MultipleChoice:
    choices = _strings(record, "choices", where, least=2)
    gold = _value(record, "gold", where)
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise DataError(
            f"{where}: gold is {gold!r}, expected the number of a choice, 0 to {len(choices) - 1}"
        )
    return MultipleChoice(_string(record, "query", where, empty=True), choices, gold)


def _cloze(record: Mapping[str, Any], where: str) -> Cloze:
    return Cloze(_string(record, "context", where, empty=True), _string(record, "continuation", where))


def _classification(record: Mapping[str, Any], where: str) -> Classification:
    label = _value(record, "label", where)
    if not isinstance(label, int | str) or isinstance(label, bool) or label == "":
        raise DataError(f"{where}: label is {label!r}, expected a number or a name")
    return Classification(_string(record, "text", where), label)


def _question_answering(record: Mapping[str, Any], where: str) -> QuestionAnswering:
    answers = _strings(record, "answers", where, least=1)
    context = _string(record, "context", where, empty=True)
    return QuestionAnswering(_string(record, "question", where), context, answers)


def _generation(record: Mapping[str, Any], where: str) -> Generation:
    return Generation(_string(record, "source", where), _string(record, "reference", where))


def _value(record: Mapping[str, Any], key: str, where: str) -> object:
    if key not in record:
        raise DataError(
            f"{where} has no '{key}', but {', '.join(record) or 'nothing'}",
            "every line of a suite has the keys of its first line",
        )
    return record[key]


def _string(record: Mapping[str, Any], key: str, where: str, *, empty: bool = False) -> str:
    return _checked(_value(record, key, where), key, where, empty=empty)


def _strings(record: Mapping[str, Any], key: str, where: str, *, least: int) -> tuple[str, ...]:
    values = _value(record, key, where)
    if not isinstance(values, list) or len(values) < least:
        came = f"a list of {len(values)}" if isinstance(values, list) else type(values).__name__
        raise DataError(f"{where}: {key} is {came}, expected a list of at least {least} strings")
    return tuple(_checked(value, key, where, empty=False) for value in values)


def _checked(value: object, key: str, where: str, *, empty: bool) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {key} holds {type(value).__name__}, expected a string")
    if not value.strip() and not empty:
        raise DataError(f"{where}: {key} holds an empty string, which cannot be scored")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {key} holds half of a surrogate pair") from error
    return value


_PARSERS: Final[Mapping[type[Example], Callable[[Mapping[str, Any], str], Example]]] = {
    MultipleChoice: _multiple_choice,
    QuestionAnswering: _question_answering,
    Cloze: _cloze,
    Classification: _classification,
    Generation: _generation,
}
_KEYS: Final = {kind: frozenset(field.name for field in fields(kind)) for kind in _PARSERS}
_EXPECTED: Final = "expected the keys of one kind: " + "; ".join(
    f"{', '.join(field.name for field in fields(kind))} ({kind.shape.value})" for kind in _PARSERS
)
