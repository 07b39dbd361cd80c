"""A number of a model's configuration, and the parameters that are as long as it says.

How many experts or tokens a model has stands in a field of its configuration, which every architecture
names in its own way. As for widths (`compress.sweep.config_search`) a field is changed, the model is
built on the meta device, and the shapes that change with it say what depends on the number. No list of names
is needed, and what a class cannot express is known before any work is done.
"""

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from compress.models.load import configuration
from compress.sweep.config_search import ConfigSearch, Shapes

_TOGETHER = 2
"""How many fields that hold the same number are changed at once."""


@dataclass(frozen=True)
class Count:
    """A number of a configuration.

    Attributes:
        fields: that hold it, under their own names.
        aliases: other spellings of these fields, each with the field that it means.
        dimensions: the parameters that are as long as it says, with the dimension in which they are.
    """

    fields: tuple[str, ...]
    aliases: Mapping[str, str]
    dimensions: Mapping[str, int]

    def document(self, document: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A ``config.json`` with another number, in its own spelling: other readers may know no other."""
        changed = dict(document)
        for field in self.fields:
            names = (field, *(alias for alias, meant in self.aliases.items() if meant == field))
            for name in [name for name in names if name in document] or [field]:
                changed[name] = number
        return changed


def find_count(
    search: ConfigSearch, document: Mapping[str, Any], old: int, new: int, anchors: Collection[str]
) -> Count | None:
    """The fields of a configuration that hold a number, and what depends on it.

    Args:
        search: of the model.
        document: a ``config.json`` that the model is built from.
        old: the number.
        new: another one, with which everything is tried.
        anchors: parameters that must be as long as it says.

    Returns:
        ``None`` where no field changes these, or one that does changes more than lengths from one number to
        the other; `ConfigSearch.refusal` has what a class said.
    """
    before = search.shapes(document)
    if before is None:
        return None
    config = configuration(search.source.path, trust_remote_code=search.run.trust_remote_code)
    holding = [name for name, value in config.to_dict().items() if type(value) is int and value == old]
    search.refusal = ""
    for together in range(1, min(len(holding), _TOGETHER) + 1):
        for fields in itertools.combinations(holding, together):
            aliases = spellings(config, fields)
            after = search.shapes(Count(fields, aliases, {}).document(document, new))
            dimensions = None if after is None else _dimensions(before, after, old, new)
            if dimensions is not None and set(anchors) <= dimensions.keys():
                return Count(fields, aliases, dimensions)
    return None


def spellings(config: Any, fields: Collection[str]) -> dict[str, str]:
    """Other spellings under which a configuration class takes some of its fields."""
    return {alias: name for alias, name in type(config).attribute_map.items() if name in fields}


def resized(shapes: Shapes, count: Count, number: int) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters with another number."""
    changed = {}
    for name, shape in shapes.items():
        place = count.dimensions.get(name)
        changed[name] = shape if place is None else (*shape[:place], number, *shape[place + 1 :])
    return changed


def _dimensions(before: Shapes, after: Shapes, old: int, new: int) -> dict[str, int] | None:
    """Where shapes went from one number to the other; ``None`` where anything else changed."""
    if after.keys() != before.keys():
        return None
    found: dict[str, int] = {}
    for name, shape in after.items():
        was = before[name]
        if was == shape:
            continue
        if len(was) != len(shape):
            return None
        places = [place for place, (one, other) in enumerate(zip(was, shape, strict=True)) if one != other]
        if len(places) != 1 or (was[places[0]], shape[places[0]]) != (old, new):
            return None
        found[name] = places[0]
    return found
