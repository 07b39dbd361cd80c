"""Marks for single cases of a test."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(fast: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Cases of a parametrized test, all of them slow but some that stand for the others.

    Args:
        fast: the cases that stay fast.
        cases: one value each, or a tuple where the test takes several.

    Raises:
        ValueError: a case that should be fast is none of them.
    """
    cases = list(cases)
    if unknown := [case for case in fast if case not in cases]:
        raise ValueError(f"{unknown} are no cases of {cases}")
    return [
        case
        if case in fast
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]
