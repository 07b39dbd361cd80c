"""Every built-in example is solved here a second time, from its own text alone."""

import re
from collections.abc import Callable
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest

from compress.core.errors import UsageError
from compress.data.builtin import tasks
from compress.data.builtin.problems import KINDS
from compress.data.suites import Shape, chance_level, expand, read_suite, shape_of


def context(query: str) -> str:
    return query.partition("\n\nQuestion:")[0].removeprefix("Context: ")


def question(query: str) -> str:
    return query.rpartition("Question: ")[2].removesuffix("\n\nAnswer:")


def where(query: str) -> str:
    person = question(query).removeprefix("Where is ").removesuffix("?")
    return re.findall(rf"{person} [^.]* (the \w+)\.", context(query))[-1]


def holder(query: str) -> str:
    thing = question(query).removeprefix("Who has the ").removesuffix("?")
    took, gave = rf"(\w+) took the {thing}\.", rf"gave the {thing} to (\w+)\."
    last = re.findall(rf"{took}|{gave}", context(query))[-1]
    return last[0] or last[1]


def sums(asked: str, text: str) -> str:
    assert not text
    first, sign, second = asked.removeprefix("What is ").removesuffix("?").split()
    return str(int(first) + int(second) if sign == "+" else int(first) - int(second))


def series(asked: str, text: str) -> str:
    numbers = list(map(int, text.split()))
    steps = {later - earlier for earlier, later in pairwise(numbers)}
    assert len(steps) == 1
    return str(numbers[-1] + steps.pop())


def times(asked: str, text: str) -> str:
    left, minutes = re.findall(r"at (\d+:\d\d)\. It took (\d+) minutes", text)[0]
    arrival = datetime.strptime(left, "%H:%M") + timedelta(minutes=int(minutes))
    return f"{arrival.hour}:{arrival.minute:02}"


def counting(asked: str, text: str) -> str:
    person = asked.removesuffix("?").split()[-1]
    left = 0
    for sentence in text.split(". "):
        number = int(re.findall(r"\d+", sentence)[0])
        lost = sentence.startswith((f"{person} lost", f"{person} gave"))
        left += -number if lost else number
        assert left > 0
    return str(left)


def recall(asked: str, text: str) -> str:
    person = asked.removeprefix("Which number has ").removesuffix("?")
    return re.findall(rf"{person} has number (\d+)", text)[0]


def sorting(asked: str, text: str) -> str:
    return " ".join(map(str, sorted(map(int, text.split()))))


def copying(asked: str, text: str) -> str:
    return " ".join(text.split()[::-1] if "backwards" in asked else text.split())


def ending(text: str) -> str:
    """What the last person carries, by following every thing from hand to hand."""
    carries: dict[str, str] = {}
    for person, verb, thing, receiver in re.findall(
        r"(\w+) (took|found|gave|left) the (\w+)(?: to (\w+)| in the \w+)?\.", text
    ):
        if verb in ("took", "found"):
            carries[person] = thing
        else:
            assert carries.pop(person) == thing
            if verb == "gave":
                carries[receiver] = thing
    person = re.findall(r"At last (\w+) was in the \w+ with the$", text)[0]
    return carries[person]


CHOOSERS: dict[str, Callable[[str], str]] = {
    "where": where,
    "holder": holder,
}
WRITERS: dict[str, Callable[[str, str], str]] = {
    "sums": sums,
    "series": series,
    "times": times,
    "counting": counting,
    "recall": recall,
    "sorting": sorting,
    "copying": copying,
}


@pytest.mark.parametrize("name", KINDS)
def test_the_answers_are_right(name: str) -> None:
    records = list(tasks.records(name))
    assert len(records) == tasks.EXAMPLES
    for record in records:
        if name in CHOOSERS:
            assert record["choices"][record["gold"]] == CHOOSERS[name](record["query"]), record
            assert len(set(record["choices"])) == len(record["choices"])
        elif name in WRITERS:
            assert record["answers"] == [WRITERS[name](record["question"], record["context"])]
        else:
            assert record["continuation"] == ending(record["context"])


@pytest.mark.parametrize("name", KINDS)
def test_a_suite_is_read_as_one_of_a_file_is(name: str) -> None:
    suite = read_suite(f"builtin:tasks/{name}")
    assert suite.name == name
    assert suite.shape is KINDS[name].shape is shape_of(f"builtin:tasks/{name}")
    assert len(set(suite.examples)) == len(suite.examples) == tasks.EXAMPLES
    assert read_suite(f"builtin:tasks/{name}", limit=7).examples == suite.examples[:7]


def test_chance_levels_are_low_and_of_multiple_choice_blind() -> None:
    levels = {name: chance_level(read_suite(f"builtin:tasks/{name}")) for name in KINDS}
    assert levels["where"] == 0.25
    assert levels["holder"] == pytest.approx(1 / 3)
    for name, kind in KINDS.items():
        if kind.shape is not Shape.MULTIPLE_CHOICE:
            assert levels[name] < 0.1


def test_gold_is_at_every_place() -> None:
    golds: list[Any] = [record["gold"] for record in tasks.records("where")]
    assert all(golds.count(place) > len(golds) / 8 for place in range(4))


def test_names() -> None:
    assert expand(["a.jsonl", "builtin:tasks"]) == ("a.jsonl", *(f"builtin:tasks/{name}" for name in KINDS))
    assert expand(["builtin:tasks/sums"]) == ("builtin:tasks/sums",)
    with pytest.raises(UsageError, match=r"no suite 'sort'.*did you mean 'sorting'"):
        expand(["builtin:tasks/sort"])
    with pytest.raises(UsageError, match=r"no built-in suites are called 'task'.*did you mean"):
        read_suite("builtin:task")
    with pytest.raises(UsageError, match=r"stands for several suites: where, .*name one"):
        read_suite("builtin:tasks")
