"""Patterns over module names: globs, or regular expressions after ``re:``."""

import fnmatch
import re
from collections.abc import Iterable

from compress.core.errors import UsageError


def matches(pattern: str, name: str) -> bool:
    """Whether a dotted module name matches a glob (``*.down_proj``) or ``re:`` expression (full match).

    Raises:
        UsageError: the regular expression does not compile.
    """
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern.removeprefix("re:"), name) is not None
        except re.error as error:
            raise UsageError(f"pattern '{pattern}' is not a regular expression: {error}") from error
    return fnmatch.fnmatchcase(name, pattern)


def matches_any(patterns: Iterable[str], name: str) -> bool:
    """Whether any of the patterns matches."""
    return any(matches(pattern, name) for pattern in patterns)
