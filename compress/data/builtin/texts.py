"""``builtin:stories``: documents of the small world, split by split."""

import itertools
from collections.abc import Iterator
from typing import Final

from compress.core.errors import UsageError, did_you_mean
from compress.data.builtin.draws import Draws
from compress.data.builtin.problems import KINDS, PARAGRAPH, Kind, Problem
from compress.data.builtin.splits import Split, split_of
from compress.data.suites import Shape

SIZES: Final = {
    Split.TRAIN: 32_768,
    Split.CALIBRATION: 4_096,
    Split.VALIDATION: 2_048,
    Split.TEST: 2_048,
}
"""How many documents each split has; `documents` goes on for as long as it is asked."""


_NAME: Final = "builtin:stories"


def is_whole(source: str) -> bool:
    """Whether a source names the text without a split."""
    return source == _NAME


def split_named(source: str) -> Split:
    """The split that ``builtin:stories/SPLIT`` names.

    Raises:
        UsageError: no built-in text, or none of its splits, has this name.
    """
    name, _, split = source.partition("/")
    if name != _NAME:
        hint = did_you_mean(name, [_NAME])
        raise UsageError(f"no built-in text is called '{name.removeprefix('builtin:')}'", hint)
    if split not in list(Split):
        raise UsageError(f"{_NAME} has no split '{split}'", did_you_mean(split, list(Split)))
    return Split(split)


def documents(split: Split) -> Iterator[str]:
    """The documents of a split, without end; the text that has a name is the first `SIZES` of them."""
    for problems in drawn(split):
        yield PARAGRAPH.join(_told(kind, problem) for kind, problem in problems)


def text(split: Split) -> Iterator[str]:
    """The documents of the text that has a name."""
    return itertools.islice(documents(split), SIZES[split])


def drawn(split: Split) -> Iterator[list[tuple[Kind, Problem]]]:
    """What each document of a split consists of, without end."""
    draws = Draws(f"stories {split}")
    kinds = list(KINDS.values())
    weights = [kind.weight for kind in kinds]
    while True:
        kind = kinds[draws.weighted(weights)]
        count = draws.between(*kind.together)
        yield [(kind, within(split, kind, draws)) for _ in range(count)]


def within(split: Split, kind: Kind, draws: Draws) -> Problem:
    """The next problem of a kind that belongs to a split."""
    while True:
        problem = kind.draw(draws)
        if split_of(problem.identity) is split:
            return problem


def _told(kind: Kind, problem: Problem) -> str:
    if kind.shape is Shape.CLOZE:
        return f"{problem.context} {problem.asked[0].answer}."
    return problem.text
