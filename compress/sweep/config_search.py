"""Which fields of a model's configuration hold a number, found by changing them and looking at the shapes.

Every architecture names its numbers in its own way (`intermediate_size`, `ffn_dim`, `n_inner`), some are
derived from others, and some classes refuse what others take. So a configuration with other numbers is
written, the model is built from it on the meta device, and the shapes of its parameters say whether these
were the right fields. What a class cannot express is thereby known before any work is done.
"""

import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, final

import torch
from huggingface_hub.errors import StrictDataclassError

from compress.core.artifact import Artifact
from compress.core.errors import ModelError
from compress.core.run import Run
from compress.models.load import configuration, skeleton

Shapes = Mapping[str, tuple[int, ...]]

_TOGETHER = 3
"""How many fields that hold the same number are changed at once: heads, key-value heads, and one more."""
HEAD_WIDTH = "head_dim"
"""What transformers' attention reads where a configuration class has no field for the width of a head."""


@final
@dataclass
class ConfigSearch:
    """Changes of one model's configuration.

    Attributes:
        source: the model.
        run: its task, and whether its code may run.
        refusal: what was said of the first configuration of a search that could not be built.
    """

    source: Artifact
    run: Run
    refusal: str = field(default="", init=False)
    _built: dict[str, Shapes | None] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._config = configuration(self.source.path, trust_remote_code=self.run.trust_remote_code)
        self._fields: dict[str, Any] = self._config.to_dict()

    def shapes(self, document: Mapping[str, Any]) -> Shapes | None:
        """The shapes of all parameters of a ``config.json``, or ``None`` where no model can be built."""
        key = json.dumps(document, sort_keys=True, default=str)
        if key not in self._built:
            self._built[key] = self._build(document)
        return self._built[key]

    def width(self, document: Mapping[str, Any], old: int, new: int, wanted: Shapes) -> dict[str, Any] | None:
        """The configuration with another width of its MLP, or ``None`` where it cannot say so.

        A field that is absent or null counts as well: its class derives the width from another one then.

        Args:
            wanted: the shapes that all parameters must have.
        """
        unset = [name for name, value in self._fields.items() if value is None]
        choices = itertools.chain(
            _subsets(self._holding(old), new), ({name: new} for name in unset if old != new)
        )
        return self._first(document, choices, lambda shapes: shapes == wanted)

    def heads(
        self,
        document: Mapping[str, Any],
        old: tuple[int, int, int],
        new: tuple[int, int],
        wanted: Shapes,
    ) -> dict[str, Any] | None:
        """The configuration with other numbers of heads, or ``None`` where it cannot say so.

        Args:
            old: key-value heads, query heads to each, width of a head.
            new: key-value heads, query heads to each.
            wanted: the shapes that all parameters must have.
        """
        return self._first(document, self._heads(old, new), lambda shapes: shapes == wanted)

    def hidden(
        self,
        document: Mapping[str, Any],
        old: int,
        new: int,
        fits: Callable[[Shapes], bool],
        *,
        widths: Sequence[int] = (),
        heads: tuple[tuple[int, int, int], tuple[int, int]] | None = None,
    ) -> dict[str, Any] | None:
        """The configuration with another hidden size, or ``None`` where it cannot say so.

        Args:
            fits: whether these are the shapes of a model with that size.
            widths: of heads and MLPs, which some classes derive from the hidden size where they are not said.
            heads: what `heads` is given as old and new, where their number changes as well.
        """
        sizes = list(_subsets(self._holding(old), new))
        said: list[dict[str, Any]] = [{}]
        for width in widths:
            named = [{name: width} for name in self._holding(width) if name != HEAD_WIDTH]
            said += [{HEAD_WIDTH: width}, *named]
        # Heads that could not be told apart part the hidden size all the same, as often as some field says.
        counts = {value for value in self._fields.values() if type(value) is int and 1 < value < old}
        derived_widths = sorted({old // count for count in counts if old % count == 0} - set(widths))
        said += [{HEAD_WIDTH: width} for width in derived_widths]
        unset = [name for name, value in self._fields.items() if value is None]
        also = list(self._heads(*heads)) if heads is not None else [{}]
        found = self._first(document, _together(said, also, sizes), fits)
        if found is None:
            refusal = self.refusal
            derived = [{name: width} for name in unset for width in widths]
            found = self._first(document, _together(derived, also, sizes[:1]), fits)
            # What a class says of fields that have nothing to do with it is of no interest.
            self.refusal = refusal
        return found

    def _heads(self, old: tuple[int, int, int], new: tuple[int, int]) -> Iterator[dict[str, Any]]:
        groups, parts, width = old
        queries = list(_subsets(self._holding(groups * parts), new[0] * new[1]))
        keys: list[dict[str, Any]] = [{}]
        if parts > 1 and new[0] != groups:
            keys = list(_subsets(self._holding(groups), new[0]))
        widths: list[dict[str, Any]] = [{}, {HEAD_WIDTH: width}]
        widths += [{name: width} for name in self._holding(width) if name != HEAD_WIDTH]
        return (
            {**width_, **key, **query}
            for width_, key, query in itertools.product(widths, keys, queries)
            # A field that holds both numbers by chance cannot be set to two.
            if not width_.keys() & (key.keys() | query.keys())
        )

    def _holding(self, number: int) -> list[str]:
        return [name for name, value in self._fields.items() if type(value) is int and value == number]

    def _first(
        self,
        document: Mapping[str, Any],
        choices: Iterator[dict[str, Any]],
        fits: Callable[[Shapes], bool],
    ) -> dict[str, Any] | None:
        self.refusal = ""
        for edits in choices:
            changed = self.edited(document, edits)
            shapes = self.shapes(changed)
            if shapes is not None and fits(shapes):
                return changed
        return None

    def edited(self, document: Mapping[str, Any], edits: Mapping[str, Any]) -> dict[str, Any]:
        """The document with some fields set, under their own names and under no alias beside it.

        A name with dots lies in a section of the document (`flat`).
        """
        aliases = {alias for alias, name in type(self._config).attribute_map.items() if name in edits}
        changed = {name: value for name, value in document.items() if name not in aliases}
        for name, value in edits.items():
            *path, leaf = name.split(".")
            section = changed
            for part in path:
                section[part] = dict(section.get(part) or {})
                section = section[part]
            section[leaf] = value
        return changed

    def model(self, document: Mapping[str, Any]) -> Any | None:
        """A skeleton of what a ``config.json`` describes, or ``None`` where no model can be built."""
        try:
            return model_of(self.source, document, self.run)
        except (ModelError, StrictDataclassError, ArithmeticError, AssertionError, LookupError) as error:
            # A class may refuse a number while the configuration or while the model is built.
            self.refusal = self.refusal or " ".join(str(error.__cause__ or error).split())
            return None

    def _build(self, document: Mapping[str, Any]) -> Shapes | None:
        model = self.model(document)
        if model is None:
            return None
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def model_of(
    source: Artifact, document: Mapping[str, Any], run: Run, dtype: torch.dtype = torch.float32
) -> Any:
    """A skeleton of the model that another ``config.json`` describes, as `compress.models.load.skeleton`.

    Args:
        source: the model whose code files count, where code of its own may run.

    Raises:
        ModelError: the model cannot be built.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "config.json").write_text(json.dumps(document), encoding="utf-8")
        if run.trust_remote_code:
            for file in source.path.glob("*.py"):
                shutil.copyfile(file, path / file.name)
        trial = replace(source, path=path, config=document)
        return skeleton(trial, task=run.task, dtype=dtype, trust_remote_code=run.trust_remote_code)


def flat(fields: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """The fields of a configuration and of its sections, whose names get a dot behind the section's."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        path = f"{section}.{name}" if section else str(name)
        found |= flat(value, path) if isinstance(value, Mapping) else {path: value}
    return found


_ABSENT: Final = object()


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that another one does not have, or has with another value."""
    known = flat(before)
    return {name: value for name, value in flat(after).items() if known.get(name, _ABSENT) != value}


def _subsets(names: list[str], value: int) -> Iterator[dict[str, Any]]:
    """Some of the fields set to a value, few before many."""
    for count in range(1, min(len(names), _TOGETHER) + 1):
        for chosen in itertools.combinations(names, count):
            yield dict.fromkeys(chosen, value)


def _together(*choices: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Edits of several kinds at once, where none of their fields is set to two numbers."""
    for edits in itertools.product(*choices):
        if sum(map(len, edits)) == len({name for each in edits for name in each}):
            yield {name: value for each in edits for name, value in each.items()}
