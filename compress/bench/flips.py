"""Answers that a compression changed: an accuracy that stays the same can hide many of them.

Dutta et al. 2024, "Accuracy is Not All You Need": answers flip both ways, and a wrong answer can become
another wrong one, which no accuracy shows.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from compress.bench.results import ArmResult, Flip, FlipKind, Flips
from compress.core.measurement import Measurement
from compress.data.suites import Classification, Cloze, Example, MultipleChoice, QuestionAnswering, Suite

_MOST_CHARACTERS: Final = 300


def flips(
    before: Measurement,
    after: Measurement,
    *,
    metric: str = "",
    names: tuple[str, str] = ("before", "after"),
    suite: Suite | None = None,
    most: int = 5,
) -> Flips:
    """Compare two arms' answers to the same examples.

    Args:
        before, after: samples of 1 (right) or 0 (wrong) with the answers beside them.
        metric: the quantity that both are.
        names: of the arms.
        suite: the examples, to say what was asked; none leaves that out.
        most: flips of each kind that are shown.

    Raises:
        ValueError: there are no answers, or the two were not measured on the same examples.
    """
    if before.answers is None or after.answers is None:
        raise ValueError("no answers are kept beside these samples")
    if before.conditions != after.conditions or len(before.samples) != len(after.samples):
        raise ValueError("the two were not measured on the same examples")
    found: dict[FlipKind, list[Flip]] = {
        "right-to-wrong": [],
        "wrong-to-right": [],
        "wrong-to-other-wrong": [],
    }
    pairs = zip(before.samples, after.samples, before.answers, after.answers, strict=True)
    for number, (was, is_now, old, new) in enumerate(pairs):
        kind = _kind(was >= 1, is_now >= 1, old != new)
        if kind is not None:
            example = None if suite is None else suite.examples[number]
            found[kind].append(_flip(number, kind, old, new, example))
    return Flips(
        metric=metric,
        before=names[0],
        after=names[1],
        examples=len(before.samples),
        right_to_wrong=len(found["right-to-wrong"]),
        wrong_to_right=len(found["wrong-to-right"]),
        wrong_to_other_wrong=len(found["wrong-to-other-wrong"]),
        shown=tuple(flip for flips_ in found.values() for flip in flips_[:most]),
    )


def flips_of(
    before: ArmResult, after: ArmResult, suites: Iterable[Suite] = (), *, most: int = 5
) -> list[Flips]:
    """The flips of a pair of arms in every quantity that keeps answers and was measured alike in both.

    Args:
        before, after: the arms.
        suites: the examples that the quantities are about, to say what was asked.
        most: flips of each kind that are shown.
    """
    by_digest = {suite.digest: suite for suite in suites}
    found = []
    for metric, new in after.measurements.items():
        old = before.measurements.get(metric)
        if old is None or old.answers is None or new.answers is None or old.conditions != new.conditions:
            continue
        suite = by_digest.get(str(new.conditions.get("protocol", {}).get("suite")))
        names = (before.name, after.name)
        found.append(flips(old, new, metric=metric, names=names, suite=suite, most=most))
    return found


def _kind(was_right: bool, is_right: bool, differs: bool) -> FlipKind | None:
    if was_right != is_right:
        return "right-to-wrong" if was_right else "wrong-to-right"
    return "wrong-to-other-wrong" if differs and not is_right else None


def _flip(number: int, kind: FlipKind, before: str, after: str, example: Example | None) -> Flip:
    question, gold, choices = _told(example)
    return Flip(
        example=number,
        kind=kind,
        before=_shortened(_choice(before, choices)),
        after=_shortened(_choice(after, choices)),
        question=_shortened(question),
        gold=_shortened(gold),
    )


def _told(example: Example | None) -> tuple[str, str, Sequence[str]]:
    """What was asked, what is right, and the choices by number where there are any."""
    if isinstance(example, MultipleChoice):
        return example.query, example.choices[example.gold], example.choices
    if isinstance(example, Cloze):
        # How a context ends says more about what follows than how it begins.
        return example.context[-_MOST_CHARACTERS:], example.continuation, ()
    if isinstance(example, Classification):
        return example.text, str(example.label), ()
    if isinstance(example, QuestionAnswering):
        return example.question, example.answers[0], ()
    return "", "", ()


def _choice(answer: str, choices: Sequence[str]) -> str:
    return choices[int(answer)] if choices else answer


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"
