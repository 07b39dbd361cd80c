"""Token numbers in the files beside a model's weights: found, and rewritten when tokens get other numbers.

Configurations name tokens by fields that end in ``_token_id`` (``eos_token_id``, which may be a list, or
``image_token_index``), generation configurations also by lists of tokens that must not or must come.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from compress.core.errors import PlanError

_NAMED: Final = re.compile(r"(^|_)token_(id|ids|index)$")
_PHRASES: Final = ("bad_words_ids", "force_words_ids")
"""Lists of lists of tokens. A forbidden phrase has to stay whole, or it would come in other pieces."""
_SINGLES: Final = ("suppress_tokens", "begin_suppress_tokens")
"""Lists of tokens none of which may come: one that is gone cannot."""
_STRANGE: Final = ("sequence_bias", "forced_decoder_ids")


def named(document: Mapping[str, Any]) -> set[int]:
    """The tokens that a configuration needs, by their numbers; inner configurations included.

    Raises:
        PlanError: it names tokens in a form that cannot be rewritten.
    """
    found: set[int] = set()
    for key, value in document.items():
        if key in _STRANGE and value:
            raise PlanError(
                f"the generation configuration names tokens in {key}, which cannot be given other numbers",
                f"remove {key} from generation_config.json",
            )
        if isinstance(value, Mapping):
            found |= named(value)
        elif _NAMED.search(key) or key in _PHRASES:
            found |= {number for number in _flat(value) if number >= 0}
    return found


def renumbered(document: Mapping[str, Any], new: Mapping[int, int], rows: int) -> dict[str, Any]:
    """A configuration whose tokens have new numbers.

    Args:
        new: new numbers by old ones; everything `named` is among them, as far as it lies below ``rows``.
        rows: of the embedding before. A number beyond means no token, and stays.
    """

    def mapped(value: Any) -> Any:
        if isinstance(value, list):
            return [mapped(entry) for entry in value]
        if type(value) is int and 0 <= value < rows:
            return new[value]
        return value

    changed: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            changed[key] = renumbered(value, new, rows)
        elif _NAMED.search(key) or key in _PHRASES:
            changed[key] = mapped(value)
        elif key in _SINGLES and isinstance(value, list):
            changed[key] = [mapped(number) for number in value if number in new or not 0 <= number < rows]
        else:
            changed[key] = value
    return changed


def implied(document: Mapping[str, Any], full: Mapping[str, Any], rows: int) -> dict[str, int]:
    """Tokens that a configuration class names where the document does not: its defaults, spelled out.

    Args:
        document: a ``config.json``.
        full: all fields of the configuration that is made of it.
        rows: of the embedding; a default beyond means no token.
    """
    return {
        key: value
        for key, value in full.items()
        if key not in document and _NAMED.search(key) and type(value) is int and 0 <= value < rows
    }


def without(entries: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """A mapping from tokens' numbers, written as text, with new numbers and without what is gone."""
    return {str(new[int(number)]): entry for number, entry in entries.items() if int(number) in new}


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, Collection) and not isinstance(value, str):
        for entry in value:
            yield from _flat(entry)
    elif type(value) is int:
        yield value
