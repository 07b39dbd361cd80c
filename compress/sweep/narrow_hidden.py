"""What narrowing the residual stream takes out of a model, settled before any weight is read.

The hidden size is one number for the whole model. What has a place for each of its channels is found by
poisoning them (`compress.models.residual`), and the configuration by changing it and looking at the shapes: a
class that can say another hidden size changes exactly these places and nothing else. Classes that have as
many channels as all heads together (GPT-2, BERT) lose heads with them, where heads may go as well.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.run import Run
from compress.models.architecture import found_in
from compress.models.checkpoint import Checkpoint
from compress.models.load import skeleton
from compress.models.residual import Residual, find_residual
from compress.sweep.config_search import ConfigSearch, Shapes, model_of
from compress.sweep.narrow_cuts import Cut

_TRIED: Final = 4
"""How many hidden sizes are tried: a class that refuses these refuses all."""
_HINT: Final = "leave the hidden size as it is, and prune channels, heads or blocks"


@dataclass(frozen=True)
class Hidden:
    """A residual stream that loses channels.

    Attributes:
        residual: what reads and writes it.
        count: channels that stay.
        dimensions: by the name of a parameter, those that count channels.
    """

    residual: Residual
    count: int
    dimensions: Mapping[str, tuple[int, ...]]

    def cuts(self, model: Any, kept: torch.Tensor) -> dict[str, Cut]:
        """What stays of every parameter, shared ones under each of their names.

        Args:
            kept: int64, the channels that stay, in order.
        """
        counted = {
            id(parameter): self.dimensions[name]
            for name, parameter in model.named_parameters()
            if name in self.dimensions
        }
        return {
            name: Cut(name, dict.fromkeys(counted[id(parameter)], kept))
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if id(parameter) in counted
        }


@dataclass(frozen=True)
class Heads:
    """Heads that may go together with channels of the stream.

    Attributes:
        shape: groups, parts in a group, columns in a part.
        shapes: of all parameters with fewer of them, by groups and parts in a group that stay.
    """

    shape: tuple[int, int, int]
    shapes: Mapping[tuple[int, int], Shapes]


@dataclass(frozen=True)
class HiddenFound:
    """A hidden size that the configuration class accepts.

    Attributes:
        hidden: what is cut.
        heads: groups and parts in each that stay, where heads go with the channels.
        config: the ``config.json``.
        shapes: of all parameters.
    """

    hidden: Hidden
    heads: tuple[int, int] | None
    config: Mapping[str, Any]
    shapes: Shapes


class HiddenSearch:
    """Looks for hidden sizes that a configuration class accepts.

    Args:
        source: the model.
        run: its task, and whether its code may run.
        search: tries configurations.

    Attributes:
        residual: what was found of the stream.
        refusal: why the first size that was tried is not to be had.

    Raises:
        PlanError: channels of the stream are not its own, or a tensor on disk has them and is not loaded.
    """

    def __init__(self, source: Artifact, run: Run, search: ConfigSearch) -> None:
        self._source, self._run, self._search = source, run, search
        self.residual = found_in(find_residual, source, run)
        self._model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
        self._required = self._first_names(self.residual.dimensions(self._model))
        self.refusal = ""
        self._check_on_disk()

    def _first_names(self, found: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Dimensions by the first name of each parameter: shared ones have several."""
        first = {id(parameter): name for name, parameter in self._model.named_parameters()}
        everywhere = dict(self._model.named_parameters(remove_duplicate=False))
        named: dict[str, tuple[int, ...]] = {}
        for name, places in found.items():
            own = first[id(everywhere[name])]
            named[own] = tuple(sorted({*named.get(own, ()), *places}))
        return named

    def _check_on_disk(self) -> None:
        checkpoint = Checkpoint(self._source, self._model)
        known = self._model.state_dict().keys()
        for name in checkpoint.names:
            strange = checkpoint.target[name] not in known and name not in checkpoint.passed_over
            if strange and self.residual.width in checkpoint.shape(name):
                raise PlanError(
                    f"{name} may have an entry for each channel and belongs to no part of the model that "
                    "the task loads",
                    "give the --task that uses it, or save the model without it",
                )

    def nearest(
        self,
        counts: Iterator[int],
        document: Mapping[str, Any],
        shapes: Shapes,
        widths: Sequence[int],
        heads: Heads | None = None,
    ) -> HiddenFound | None:
        """The first of some hidden sizes that is accepted, ``None`` where none of the first few is.

        Args:
            counts: the sizes, the most wanted first.
            document: the configuration so far.
            shapes: of all parameters so far.
            widths: of heads and MLPs.
            heads: that go with the channels, for classes in which both are one number; as many as it takes.
        """
        self.refusal = ""
        for count in itertools.islice(counts, _TRIED):
            if heads is None:
                found = self._with(count, document, shapes, widths)
            else:
                found = self._with_heads(count, document, widths, heads)
            if found is not None:
                return found
            kind = self._source.config.get("model_type", "the model")
            self.refusal = (
                self.refusal
                or self._search.refusal
                or (f"no field of the configuration class of '{kind}' gives the weights that shape")
            )
        return None

    def _with(
        self, count: int, document: Mapping[str, Any], shapes: Shapes, widths: Sequence[int]
    ) -> HiddenFound | None:
        found = self._search.hidden(
            document,
            self.residual.width,
            count,
            lambda after: self._dimensions(shapes, after, count) is not None,
            widths=widths,
        )
        return None if found is None else self._found(count, None, found, shapes)

    def _with_heads(
        self, count: int, document: Mapping[str, Any], widths: Sequence[int], heads: Heads
    ) -> HiddenFound | None:
        """A size that is as many heads as it takes."""
        groups, parts, width = heads.shape
        wanted, rest = divmod(count, width)
        if rest:
            return None
        for kept, shapes in heads.shapes.items():
            if kept[0] * kept[1] != wanted or kept == (groups, parts):
                continue
            found = self._search.hidden(
                document,
                self.residual.width,
                count,
                lambda after, before=shapes: self._dimensions(before, after, count) is not None,  # type: ignore[misc]
                widths=widths,
                heads=(heads.shape, kept),
            )
            if found is not None:
                return self._found(count, kept, found, shapes)
        return None

    def _found(
        self, count: int, heads: tuple[int, int] | None, config: Mapping[str, Any], before: Shapes
    ) -> HiddenFound | None:
        shapes = self._search.shapes(config)
        dimensions = None if shapes is None else self._dimensions(before, shapes, count)
        if shapes is None or dimensions is None:
            return None
        reason = self._other_numbers(config)
        if reason:
            self.refusal = self.refusal or reason
            return None
        return HiddenFound(Hidden(self.residual, count, dimensions), heads, config, shapes)

    def _dimensions(self, before: Shapes, after: Shapes, count: int) -> dict[str, tuple[int, ...]] | None:
        """Where shapes went from the old size to the new; ``None`` where that is not where channels are."""
        if before.keys() != after.keys():
            return None
        width = self.residual.width
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in after.items():
            was = before[name]
            if len(was) != len(shape):
                return None
            places = tuple(place for place, size in enumerate(shape) if size != was[place])
            if any((was[place], shape[place]) != (width, count) for place in places):
                return None
            if places:
                found[name] = places
        others = self.residual.others
        for name in {*before} - {*others}:
            here, own = set(found.get(name, ())), set(self._required.get(name, ()))
            follows = name.rpartition(".")[0] in self.residual.followers
            if here != own and not (follows and own <= here):
                return None
        if any(len(found.get(name, ())) != counted for name, counted in others.items()):
            return None
        return found

    def _other_numbers(self, config: Mapping[str, Any]) -> str:
        """What else of the model depends on its hidden size: a number that it multiplies with (Gemma)."""
        narrow = model_of(self._source, config, self._run)
        wide = dict(self._model.named_modules())
        for path, module in narrow.named_modules():
            before = vars(wide[path])
            for key, value in vars(module).items():
                if type(value) is float and value != before.get(key):
                    return f"{path}.{key} would be {value:.6g} and not {before.get(key):.6g}"
            for key, buffer in module.named_buffers(recurse=False):
                other = wide[path].get_buffer(key)
                if other.shape != buffer.shape or not torch.equal(other, buffer):
                    return f"{path}.{key} would hold other numbers"
        return ""
