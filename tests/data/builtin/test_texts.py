"""The built-in text: the same bytes everywhere, and splits that share nothing."""

import hashlib
import itertools
import re
from collections.abc import Iterable

import pytest

from compress.core.errors import UsageError
from compress.data.builtin import texts
from compress.data.builtin.problems import KINDS, Problem
from compress.data.builtin.splits import Split, split_of

GOLDEN = {
    Split.TRAIN: "a10f42f873895e37cdaab3fe0dc63e0a47dd296790922eccdce135cdedf7a7e3",
    Split.CALIBRATION: "1b2910c618b384c2ff090782bfd0865442d6fccd9ecd7a8e48e54886d9bd0426",
    Split.VALIDATION: "9faa1dccad8b4827852a3b4b0293576d8d44a41bddaa861c92955b6cbbc24cf9",
    Split.TEST: "c669a5b6a8a6181c248d01c92b5a67ab03dd9fbd40b0705ff59b70fa3f71012e",
}
"""SHA-256 of the first 300 documents, joined by NUL: computed once, and the same on every machine."""


def digest(documents: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(documents).encode()).hexdigest()


@pytest.mark.parametrize("split", Split)
def test_the_bytes_are_pinned(split: Split) -> None:
    assert digest(itertools.islice(texts.text(split), 300)) == GOLDEN[split]


@pytest.fixture(scope="module", params=[1_500, pytest.param(8_000, marks=pytest.mark.slow)])
def problems(request: pytest.FixtureRequest) -> dict[Split, list[Problem]]:
    """Of the first documents of each split."""
    return {
        split: [
            problem
            for document in itertools.islice(texts.drawn(split), min(texts.SIZES[split], request.param))
            for _, problem in document
        ]
        for split in Split
    }


def test_no_problem_is_in_two_splits(problems: dict[Split, list[Problem]]) -> None:
    """By construction: every problem lies in the split that its own identity decides."""
    for split, found in problems.items():
        assert all(split_of(problem.identity) is split for problem in found)
    for one, other in itertools.combinations(Split, 2):
        for part in (lambda problem: problem.identity, lambda problem: problem.text):
            assert not set(map(part, problems[one])) & set(map(part, problems[other])), (one, other)


def test_no_document_is_in_two_splits() -> None:
    found = {split: set(itertools.islice(texts.text(split), 1_024)) for split in Split}
    for one, other in itertools.combinations(Split, 2):
        assert not found[one] & found[other]


def test_an_identity_leaves_out_how_a_problem_is_put(problems: dict[Split, list[Problem]]) -> None:
    """No sum is known from another split in the other order, and no row of numbers or words either."""

    def canonical(problem: Problem) -> str | None:
        question = problem.asked[0].question
        if " + " in question:
            return "+".join(sorted(re.findall(r"\d+", question)))
        if question.startswith(("Which order", "What are the words")):
            row = problem.context.split()
            return " ".join(sorted(row) if row[0].isdecimal() else min(row, row[::-1]))
        if question.startswith("Which number"):
            return " ".join(sorted(problem.context.split(". ")))
        return None

    by_split = {split: {canonical(each) for each in found} - {None} for split, found in problems.items()}
    assert all(len(found) > 100 for found in by_split.values())
    for one, other in itertools.combinations(Split, 2):
        assert not by_split[one] & by_split[other]


def test_every_kind_of_problem_is_there(problems: dict[Split, list[Problem]]) -> None:
    for found in problems.values():
        assert {problem.identity.split()[0] for problem in found} == {
            kind if kind != "sums" else "sum" for kind in KINDS
        }


def test_the_shares_of_the_splits() -> None:
    found = [split_of(f"problem {number}") for number in range(16_000)]
    for split, share in zip(Split, (13, 1, 1, 1), strict=True):
        assert found.count(split) == pytest.approx(1_000 * share, rel=0.15)


def test_documents_go_on_after_the_text_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 200
    monkeypatch.setitem(texts.SIZES, Split.TEST, size)
    more = list(itertools.islice(texts.documents(Split.TEST), size + 10))
    assert list(texts.text(Split.TEST)) == more[:size]


def test_names() -> None:
    assert texts.split_named("builtin:stories/calibration") is Split.CALIBRATION
    assert texts.is_whole("builtin:stories")
    assert not texts.is_whole("builtin:stories/test")
    with pytest.raises(
        UsageError, match=r"no built-in text is called 'story'.*did you mean 'builtin:stories'"
    ):
        texts.split_named("builtin:story")
    with pytest.raises(UsageError, match=r"no split 'tset'.*did you mean 'test'"):
        texts.split_named("builtin:stories/tset")
