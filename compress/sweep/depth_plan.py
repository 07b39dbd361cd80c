"""What a model looks like without some of its blocks: its configuration, and the names of what is left.

Every architecture names the number of its blocks in its own way, and many have lists with an entry for each
block (which attends to everything, which to a window). So a configuration with fewer blocks is written, the
model is built from it on the meta device, and every block of it is held against the block that would move
there: the same weights of the same shapes, and the same settings. What does not fit is not cut: the first
block of ModernBERT, which lacks a norm, stays the first block.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, final

from torch import nn

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.run import Run
from compress.models.blocks import find_blocks
from compress.models.checkpoint import Checkpoint
from compress.models.load import configuration, skeleton
from compress.sweep.config_search import ConfigSearch, Shapes

_TOGETHER: Final = 2
"""How many fields that hold the number of blocks are changed at once."""
_PLAIN: Final = (bool, int, float, str, type(None))
Outline = Mapping[str, object]
"""Classes and plain settings of all parts of a block, by path."""


@dataclass(frozen=True)
class Size:
    """How many blocks a user wants to keep.

    Attributes:
        share: of the blocks.
        blocks: their number, where it is not that of the share.
        contiguous: whether those that go must be neighbours.
    """

    share: float
    blocks: int | None = None
    contiguous: bool = False

    def stay(self, total: int) -> int:
        """How many of so many blocks stay."""
        return self.blocks if self.blocks is not None else max(1, round(total * self.share))


@final
class DepthPlan:
    """A model that is to lose blocks.

    Attributes:
        blocks: paths of its blocks, in order.
        stay: how many stay.
        contiguous: whether those that go must be neighbours.
    """

    def __init__(self, source: Artifact, run: Run, size: Size) -> None:
        self.source = source
        model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
        found = find_blocks(model)
        self.blocks = tuple(block.name for block in found)
        self.stack = self.blocks[0].rpartition(".")[0]
        self.shapes: Shapes = {name: tuple(entry.shape) for name, entry in model.named_parameters()}
        self.stay, self.contiguous = size.stay(len(self.blocks)), size.contiguous
        self._outlines = [outline(block.module) for block in found]
        self._numbers = _numbers(self._outlines)
        self._search = ConfigSearch(source, run)
        config = configuration(source.path, trust_remote_code=run.trust_remote_code)
        self._fields: dict[str, Any] = config.to_dict()
        self._holders: tuple[str, ...] | None = None
        self._known: dict[tuple[int, ...], Mapping[str, Any] | None] = {}
        if len({block.stack for block in found}) > 1:
            raise PlanError(
                f"{type(model).__name__} has several stacks of blocks: one stack is shortened",
                "prune its width with prune.width",
            )
        if len(self.blocks) == 1:
            raise PlanError(
                f"{type(model).__name__} has one block, which cannot be left out",
                "prune its width with prune.width",
            )
        if not self.stay < len(self.blocks):
            raise PlanError(
                f"nothing would be taken out of {source.path}: {self.stay} of its {len(self.blocks)} blocks "
                "would stay",
                "ask for fewer with --layers or a smaller share with --keep",
            )

    @property
    def refusal(self) -> str:
        """What was said of the first selection that no configuration expresses."""
        return self._search.refusal

    @property
    def gone(self) -> int:
        """How many blocks go."""
        return len(self.blocks) - self.stay

    def without(self, gone: Sequence[int]) -> tuple[int, ...]:
        """The blocks that stay when some go, in order."""
        return tuple(number for number in range(len(self.blocks)) if number not in set(gone))

    def fits(self, gone: Sequence[int]) -> bool:
        """Whether a configuration expresses the model without these blocks."""
        return self.config(self.without(gone)) is not None

    def config(self, kept: tuple[int, ...]) -> Mapping[str, Any] | None:
        """The ``config.json`` of the model with these blocks, or ``None`` where there is none.

        Args:
            kept: numbers of blocks, rising.
        """
        if kept not in self._known:
            self._known[kept] = self._found(kept)
        return self._known[kept]

    def shapes_of(self, kept: Sequence[int]) -> Shapes:
        """The shapes of all parameters of the model with these blocks."""
        names = {name: self.renamed(name, kept) for name in self.shapes}
        return {new: self.shapes[name] for name, new in names.items() if new is not None}

    def renamed(self, name: str, kept: Sequence[int]) -> str | None:
        """The name that a parameter has in the model with these blocks; ``None`` where it goes."""
        if not name.startswith(f"{self.stack}."):
            return name
        number, _, rest = name.removeprefix(f"{self.stack}.").partition(".")
        return f"{self.stack}.{kept.index(int(number))}.{rest}" if int(number) in kept else None

    def count(self, shapes: Shapes) -> int:
        """Numbers in all parameters of these shapes."""
        return sum(map(math.prod, shapes.values()))

    # -- the configuration -------------------------------------------------------------------------

    def _found(self, kept: tuple[int, ...]) -> Mapping[str, Any] | None:
        wanted = self.shapes_of(kept)
        refusal = self.refusal
        for holders, edits in self._edits(kept):
            document = self._search.edited(self.source.config, edits)
            model = self._search.model(document)
            if model is not None and self._is(model, kept, wanted):
                self._holders = holders
                # What was said of attempts before the right one is of no interest.
                self._search.refusal = refusal
                return document
        kind = self.source.config.get("model_type", "the model")
        self._refuse(f"no configuration of '{kind}' has these blocks and no others")
        return None

    def _refuse(self, why: str) -> None:
        self._search.refusal = self._search.refusal or why

    def _edits(self, kept: tuple[int, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
        """Fields that may hold the number of blocks, with what becomes of them and of lists over blocks."""
        total = len(self.blocks)
        holding = [name for name, value in self._fields.items() if type(value) is int and value == total]
        choices: list[tuple[str, ...]] = [(name,) for name in holding]
        if len(holding) >= _TOGETHER:
            choices += [(one, other) for place, one in enumerate(holding) for other in holding[place + 1 :]]
        if self._holders is not None:
            choices = [self._holders]
        entries = _entries(self._fields, kept, total)
        places = _places(self._fields, kept, total)
        lists: list[dict[str, Any]] = [{**entries, **places}]
        lists += [other for other in (entries, {}) if other not in lists]
        for edits in lists:
            for holders in choices:
                yield holders, {**dict.fromkeys(holders, len(kept)), **edits}

    def _is(self, model: Any, kept: tuple[int, ...], wanted: Shapes) -> bool:
        """Whether a model is the one at hand with these blocks."""
        if {name: tuple(entry.shape) for name, entry in model.named_parameters()} != wanted:
            return False
        total = len(self.blocks)
        for number, block in zip(kept, find_blocks(model), strict=True):
            before, after = self._outlines[number], outline(block.module)
            if before.keys() != after.keys():
                return False
            for key, value in before.items():
                counts = (value, after[key]) == (total, len(kept))
                if key not in self._numbers and value != after[key] and not counts:
                    self._refuse(
                        f"block {number} would have other settings in its new place ({key}: {after[key]}, "
                        f"not {value})"
                    )
                    return False
        return True


def plan_depth(size: Size, source: Artifact, run: Run) -> DepthPlan:
    """Settle how many blocks stay, and that there is a configuration for some selection of them.

    Raises:
        PlanError: no block would go, the model has several stacks, or no configuration has fewer blocks.
    """
    return _planned(size, source.path, source.digest, run.task, run.trust_remote_code)


@lru_cache(maxsize=4)
def _planned(size: Size, path: Path, digest: str, task: str, trust_remote_code: bool) -> DepthPlan:
    """The plan of a model with this digest: what is checked before a run is not found out again in it."""
    del digest  # tells one model from another at the same path
    plan = DepthPlan(Artifact.open(path), Run(task=task, trust_remote_code=trust_remote_code), size)
    windows = (range(start, start + plan.gone) for start in range(plan.stay, -1, -1))
    if any(plan.fits(window) for window in windows):
        return plan
    if not size.contiguous and one_by_one(plan, range(len(plan.blocks))) is not None:
        return plan
    raise PlanError(
        f"{plan.gone} of the {len(plan.blocks)} blocks cannot be taken out: {plan.refusal}",
        "ask for another number with --layers, or prune its width with prune.width",
    )


def one_by_one(plan: DepthPlan, order: Sequence[int]) -> tuple[int, ...] | None:
    """As many blocks as have to go, each the first in an order that a configuration can do without.

    Args:
        order: numbers of all blocks, the one that should go first in front.

    Returns:
        their numbers, rising, or ``None`` where some configuration on the way does not exist.
    """
    gone: list[int] = []
    while len(gone) < plan.gone:
        found = next((number for number in order if number not in gone and plan.fits([*gone, number])), None)
        if found is None:
            return None
        gone.append(found)
    return tuple(sorted(gone))


def outline(block: nn.Module) -> Outline:
    """What a block is built like, beside its weights: classes and plain settings of all its parts."""
    found: dict[str, object] = {}
    for path, part in block.named_modules():
        # Code of a model's own is imported anew from each folder, so classes are compared by name.
        found[f"{path} is"] = type(part).__name__
        for key, value in vars(part).items():
            if not key.startswith("_") and key != "training" and _plain(value):
                found[f"{path}.{key}".removeprefix(".")] = value
    return found


def _plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(isinstance(entry, _PLAIN) for entry in value)
    return isinstance(value, _PLAIN)


def _numbers(outlines: Sequence[Outline]) -> frozenset[str]:
    """Settings that count the blocks, from zero or from elsewhere: they change with a block's place."""
    return frozenset(key for key, first in outlines[0].items() if _counts(first, key, outlines))


def _counts(first: object, key: str, outlines: Sequence[Outline]) -> bool:
    if type(first) is not int:
        return False
    return all(
        type(each.get(key)) is int and each[key] == first + place for place, each in enumerate(outlines)
    )


def _entries(fields: Mapping[str, Any], kept: Sequence[int], total: int) -> dict[str, Any]:
    """Lists with an entry for each block, without those of blocks that go."""
    return {
        name: [value[number] for number in kept]
        for name, value in fields.items()
        if isinstance(value, list | tuple)
        and len(value) == total
        and _plain(value)
        and "token_id" not in name
        and name != "architectures"
    }


def _places(fields: Mapping[str, Any], kept: Sequence[int], total: int) -> dict[str, Any]:
    """Lists of numbers of blocks (``mlp_only_layers``), with the numbers that blocks get."""
    return {
        name: [kept.index(number) for number in value if number in kept]
        for name, value in fields.items()
        if name.endswith("_layers")
        and isinstance(value, list | tuple)
        and value
        and all(type(number) is int and 0 <= number < total for number in value)
        and sorted(set(value)) == list(value)
    }


@dataclass(frozen=True)
class DiskNames:
    """How names on disk count blocks: the part of a dotted name that is the number of its block."""

    place: int

    def renumbered(self, name: str, number: int) -> str:
        """The same name in another block."""
        parts = name.split(".")
        parts[self.place] = str(number)
        return ".".join(parts)


def disk_names(checkpoint: Checkpoint, blocks: Sequence[str]) -> DiskNames:
    """Find where names on disk count blocks, and refuse what cannot be moved to another number.

    Raises:
        PlanError: names do not count blocks in one place, or a block stores what is no parameter.
    """
    found: set[tuple[int, tuple[str, ...]]] | None = None
    parameters = {name for name, _ in checkpoint.model.named_parameters(remove_duplicate=False)}
    for number, block in enumerate(blocks):
        for name in checkpoint.names_of(block):
            if name in checkpoint.passed_over:
                continue
            if checkpoint.target[name] not in parameters:
                raise PlanError(
                    f"{name} is stored and is no weight: a block with it cannot be moved to another place",
                    "prune its width with prune.width",
                )
            parts = name.split(".")
            here = {(i, tuple(parts[:i])) for i, part in enumerate(parts) if part == str(number)}
            found = here if found is None else found & here
    if not found:
        raise PlanError(
            f"the names on disk in {checkpoint.source.path} do not number its blocks",
            "save the model with a current transformers first, and prune that",
        )
    return DiskNames(min(place for place, _ in found))
