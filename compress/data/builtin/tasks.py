"""``builtin:tasks``: suites of questions about the small world, from the test split alone."""

from collections.abc import Iterator
from typing import Any, Final

from compress.core.errors import UsageError, did_you_mean
from compress.data.builtin.draws import Draws
from compress.data.builtin.problems import KINDS, Problem
from compress.data.builtin.splits import Split
from compress.data.builtin.texts import within
from compress.data.suites import Shape

EXAMPLES: Final = 200
"""In each suite: a share of right answers is then known to about 3.5 points."""


NAME: Final = "builtin:tasks"


def named(source: str) -> list[str]:
    """The names of the suites that ``builtin:tasks`` or ``builtin:tasks/NAME`` stands for.

    Raises:
        UsageError: there is no such suite.
    """
    collection, slash, name = source.partition("/")
    if collection != NAME:
        hint = did_you_mean(collection, [NAME])
        raise UsageError(f"no built-in suites are called '{collection.removeprefix('builtin:')}'", hint)
    if not slash:
        return list(KINDS)
    if name not in KINDS:
        raise UsageError(f"{NAME} has no suite '{name}'", did_you_mean(name, KINDS))
    return [name]


def records(name: str) -> Iterator[dict[str, Any]]:
    """The examples of a suite, as the lines of its file would hold them.

    No two examples are the same problem.

    Raises:
        KeyError: no suite has this name.
    """
    kind = KINDS[name]
    draws = Draws(f"tasks {name}")
    seen: set[str] = set()
    while len(seen) < EXAMPLES:
        problem = within(Split.TEST, kind, draws)
        if problem.identity not in seen:
            seen.add(problem.identity)
            yield _record(kind.shape, problem, draws)


def _record(shape: Shape, problem: Problem, draws: Draws) -> dict[str, Any]:
    asked = problem.asked[0]
    if shape is Shape.MULTIPLE_CHOICE:
        choices = draws.mixed((asked.answer, *asked.wrong))
        return {"query": problem.prompt, "choices": choices, "gold": choices.index(asked.answer)}
    if shape is Shape.CLOZE:
        return {"context": problem.context, "continuation": asked.answer}
    return {"question": asked.question, "context": problem.context, "answers": [asked.answer]}
