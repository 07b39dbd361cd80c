"""The tree of errors: kinds, exit codes and hints."""

import inspect
from pathlib import Path

import pytest

from compress.core import errors
from compress.core.errors import CompressError, UsageError, did_you_mean

KINDS = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, CompressError)]


def test_every_kind_has_an_exit_code_of_its_own() -> None:
    codes = [kind.exit_code for kind in KINDS]
    assert len(set(codes)) == len(codes)


def test_exit_codes_keep_clear_of_the_verdicts_and_of_the_shell() -> None:
    # 10 to 13 are verdicts of the bench, 126 and above belong to the shell.
    assert all(1 <= kind.exit_code <= 9 for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_says_why_it_exists(kind: type[CompressError]) -> None:
    assert kind.__doc__


def test_message_and_hint_are_kept_apart() -> None:
    error = UsageError("bits is 5, expected 2, 3, 4 or 8", "give --bits 4")
    assert (error.message, error.hint) == ("bits is 5, expected 2, 3, 4 or 8", "give --bits 4")
    assert str(error) == "bits is 5, expected 2, 3, 4 or 8 (hint: give --bits 4)"
    assert str(UsageError("alone")) == "alone"


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("bit", ["bits", "group_size"], "did you mean 'bits'?"),
        ("zzz", ["b", "a"], "known: a, b"),
        ("zzz", [], ""),
    ],
)
def test_did_you_mean(name: str, known: list[str], hint: str) -> None:
    assert did_you_mean(name, known) == hint


def test_every_exit_code_is_documented(root: Path) -> None:
    page = (root / "docs" / "reproducibility.md").read_text(encoding="utf-8")
    assert [kind for kind in KINDS if f"\n| {kind.exit_code} | " not in page] == []
