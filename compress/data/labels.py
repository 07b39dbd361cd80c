"""Labels of examples as numbers of a model's classes."""

from collections.abc import Mapping
from typing import Any

from compress.core.errors import DataError

NONE = -1
"""The number of an example that has no label."""


def number_of(label: object, config: Mapping[str, Any]) -> int:
    """The class that a label means: by its name in the model's configuration, or a number.

    Args:
        config: the parsed ``config.json``; ``label2id`` is read.

    Raises:
        DataError: it is neither.
    """
    words = {str(word): int(number) for word, number in (config.get("label2id") or {}).items()}
    if str(label) in words:
        return words[str(label)]
    if not str(label).isdecimal():
        known = ", ".join(words) or "no labels by name"
        raise DataError(
            f"label {label!r} is no number and no label of the model", f"the model knows: {known}"
        )
    return int(str(label))
