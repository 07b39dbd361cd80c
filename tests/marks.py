"""Marks for single cases of a test."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(fast: Collection[str], cases: Iterable[str]) -> list[Any]:
    """Cases of a parametrized test, all of them slow but some that stand for the others.

    Raises:
        ValueError: a case that should be fast is none of them.
    """
    cases = list(cases)
    if unknown := set(fast) - set(cases):
        raise ValueError(f"{sorted(unknown)} are no cases of {cases}")
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]
