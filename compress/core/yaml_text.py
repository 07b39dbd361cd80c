"""YAML as a person writes it: safe, with the line of every entry, and no key given twice in silence.

Importing yaml takes as long as a third of a help page, so whoever needs this module imports it when a
recipe is read or written.
"""

from collections.abc import Sequence
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, SequenceNode

from compress.core.errors import UsageError


class _UniqueKeys(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, where plain YAML would keep the last in silence."""


def _unique_mapping(loader: _UniqueKeys, node: MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key '{key}' is given twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def parse(text: str, source: str) -> tuple[Node | None, Any]:
    """The node tree, which knows lines, and the document; an empty text is an empty mapping.

    Args:
        text: YAML.
        source: its name in error messages.

    Raises:
        UsageError: not YAML, with the line.
    """
    try:
        loader = _UniqueKeys(text)
    except yaml.reader.ReaderError as error:
        raise UsageError(f"{source}: not YAML: {error.reason}", "is it a text file?") from error
    try:
        tree = loader.get_single_node()
        document = loader.construct_document(tree) if tree is not None else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{source}:{mark.line + 1}" if mark is not None else source
        problem = getattr(error, "problem", None) or str(error)
        raise UsageError(
            f"{line}: not YAML: {problem}", "check the indentation and the quotes there"
        ) from error
    finally:
        loader.dispose()
    return tree, document


def line_of(tree: Node | None, path: Sequence[int | str]) -> int | None:
    """The line, from 1, of the deepest entry on the path that the text holds."""
    line = None
    node = tree
    for part in path:
        if isinstance(node, MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == part), None)
        elif isinstance(node, SequenceNode) and isinstance(part, int) and part < len(node.value):
            pair = (node.value[part], node.value[part])
        else:
            pair = None
        if pair is None:
            break
        line = pair[0].start_mark.line + 1
        node = pair[1]
    return line


def value_of(text: str) -> Any:
    """One value on a command line: typed as in YAML, or the text itself where it is no YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        # It can only be meant as text; the model that takes it says whether text fits.
        return text


def dump(document: Any) -> str:
    """Canonical YAML, in the order of the document."""
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)
