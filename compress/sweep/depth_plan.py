"""What a model looks like without some of its blocks: its configuration, and the names of what is left.

Every architecture names the number of its blocks in its own way, and many have lists with an entry for each
block (which attends to everything, which to a window). So a configuration with fewer blocks is written, the
model is built from it on the meta device, and every block of it is held against the block that would move
there: the same weights of the same shapes, and the same settings. What does not fit is not cut: the first
block of ModernBERT, which lacks a norm, stays the first block, and so do those of T5, which compute the bias
of relative positions for all blocks of their stack. An encoder-decoder has a number of blocks for each of its
stacks, in fields of their own.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from pathlib import Path
from typing import Any, Final, final

from torch import nn

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.run import Run
from compress.models.blocks import find_blocks
from compress.models.load import configuration, skeleton
from compress.sweep.config_search import ConfigSearch, Shapes, flat
from compress.sweep.depth_stacks import Size, Stack, shortened
from compress.sweep.narrow_cuts import ranges

_TOGETHER: Final = 2
"""How many fields that hold the number of blocks are changed at once."""
_PLAIN: Final = (bool, int, float, str, type(None))
Outline = Mapping[str, object]
"""Classes and plain settings of all parts of a block, by path."""
Holders = tuple[tuple[str, ...], ...]
"""For each stack the fields of a configuration that hold the number of its blocks."""


@dataclass(frozen=True)
class _Built:
    """What a configuration describes.

    Attributes:
        shapes: of all parameters.
        outlines: of all blocks, in order.
    """

    shapes: Shapes
    outlines: tuple[Outline, ...]


@final
class DepthPlan:
    """A model that is to lose blocks.

    Attributes:
        blocks: paths of its blocks, in order.
        stacks: which of them hand a hidden state from one to the next, and how many of these stay.
        contiguous: whether those of a stack that go must be neighbours.
    """

    def __init__(self, source: Artifact, run: Run, size: Size) -> None:
        self.source = source
        model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
        found = find_blocks(model)
        self.blocks = tuple(block.name for block in found)
        self.shapes: Shapes = {name: tuple(entry.shape) for name, entry in model.named_parameters()}
        self.contiguous = size.contiguous
        self._outlines = [outline(block.module) for block in found]
        self._search = ConfigSearch(source, run)
        config = configuration(source.path, trust_remote_code=run.trust_remote_code)
        self._fields = flat(config.to_dict())
        self._holders: Holders | None = None
        self._known: dict[tuple[int, ...], Mapping[str, Any] | None] = {}
        self._built: dict[str, _Built | None] = {}
        self.stacks = shortened(self.blocks, size)
        self._numbers = [_numbers([self._outlines[n] for n in stack.numbers]) for stack in self.stacks]
        if len(self.blocks) == len(self.stacks):
            where = "" if len(self.stacks) == 1 else f" in each of its {len(self.stacks)} stacks"
            raise PlanError(
                f"{type(model).__name__} has one block{where}, which cannot be left out",
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
    def stay(self) -> int:
        """How many blocks stay, of all stacks together."""
        return sum(stack.stay for stack in self.stacks)

    @property
    def gone(self) -> int:
        """How many blocks go, of all stacks together."""
        return len(self.blocks) - self.stay

    def without(self, gone: Sequence[int]) -> tuple[int, ...]:
        """The blocks that stay when some go, in order."""
        return tuple(number for number in range(len(self.blocks)) if number not in set(gone))

    def last(self) -> tuple[int, ...]:
        """The blocks that go where the last ones of every stack do."""
        return tuple(number for stack in self.stacks for number in stack.numbers[stack.stay :])

    def open(self, gone: Sequence[int], number: int) -> bool:
        """Whether a block may go beside others without its stack losing more than it is to lose."""
        stack = next(stack for stack in self.stacks if number in stack.numbers)
        return number not in gone and len(stack.within(gone)) < stack.gone

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
        for stack in self.stacks:
            if name.startswith(f"{stack.path}."):
                number, _, rest = name.removeprefix(f"{stack.path}.").partition(".")
                staying = stack.within(kept)
                here = int(number)
                return f"{stack.path}.{staying.index(here)}.{rest}" if here in staying else None
        return name

    def count(self, shapes: Shapes) -> int:
        """Numbers in all parameters of these shapes."""
        return sum(map(math.prod, shapes.values()))

    def words(self, numbers: Sequence[int]) -> str:
        """Some blocks in few words: ``0-3 5``, with several stacks ``encoder.block 1 3, decoder.block 2``."""
        if len(self.stacks) == 1:
            return ranges(numbers)
        within = {stack.path: ranges(stack.within(numbers)) for stack in self.stacks}
        return ", ".join(f"{path} {found}" for path, found in within.items() if found)

    def held(self) -> dict[str, str]:
        """First blocks that cannot go, by path, with the reason in words.

        The first block of a stack may have what the others lack (the bias of relative positions that T5
        computes there for all of them), or lack what they have (a norm, in ModernBERT).
        """
        found: dict[str, str] = {}
        for stack in self.stacks:
            last = self.last()
            ends = stack.within(last)
            if not ends:
                continue
            other = [number for number in last if number not in stack.numbers]
            first = [stack.first, *(stack.first + place for place in ends[1:])]
            if not self.fits(last) or self.fits(sorted([*other, *first])):
                continue
            found[self.blocks[stack.first]] = self._why_first(stack)
        return found

    def _why_first(self, stack: Stack) -> str:
        names = [
            {name.removeprefix(f"{self.blocks[n]}.") for name in self.shapes if _inside(name, self.blocks[n])}
            for n in stack.numbers
        ]
        others = set.union(*names[1:])
        for what, left in (("it alone has", names[0] - others), ("it has no", others - names[0])):
            if left:
                return f"{what} {min(left)}"
        return "another block would have other settings in its place"

    # -- the configuration -------------------------------------------------------------------------

    def _found(self, kept: tuple[int, ...]) -> Mapping[str, Any] | None:
        wanted = self.shapes_of(kept)
        counts = {len(stack.within(kept)) for stack in self.stacks}
        # Of stacks that keep as many blocks, or all of them, another field may have stood for the right one.
        certain = len(counts) == len(self.stacks) and all(len(s.within(kept)) < s.size for s in self.stacks)
        refusal = self.refusal
        for holders, edits in self._edits(kept):
            document = self._search.edited(self.source.config, edits)
            built = self._described(document)
            if built is not None and self._is(built, kept, wanted):
                if certain:
                    self._holders = holders
                # What was said of attempts before the right one is of no interest.
                self._search.refusal = refusal
                return document
        kind = self.source.config.get("model_type", "the model")
        self._refuse(f"no configuration of '{kind}' has these blocks and no others")
        return None

    def _refuse(self, why: str) -> None:
        self._search.refusal = self._search.refusal or why

    def _described(self, document: Mapping[str, Any]) -> _Built | None:
        """What a configuration describes; most say how many blocks there are and not which."""
        key = json.dumps(document, sort_keys=True, default=str)
        if key not in self._built:
            model = self._search.model(document)
            self._built[key] = (
                None
                if model is None
                else _Built(
                    {name: tuple(entry.shape) for name, entry in model.named_parameters()},
                    tuple(outline(block.module) for block in find_blocks(model)),
                )
            )
        return self._built[key]

    def _edits(self, kept: tuple[int, ...]) -> Iterator[tuple[Holders, dict[str, Any]]]:
        """Fields that may hold the numbers of blocks, with what becomes of them and of lists over blocks."""
        choices = [self._holders] if self._holders is not None else self._choices()
        for holders in choices:
            numbers = [
                (name, len(stack.within(kept)))
                for stack, names in zip(self.stacks, holders, strict=True)
                for name in names
            ]
            # A field cannot hold two numbers.
            if len(dict(numbers)) == len(set(numbers)):
                for lists in self._lists(kept, holders):
                    yield holders, {**dict(numbers), **lists}

    def _lists(self, kept: tuple[int, ...], holders: Holders) -> Iterator[dict[str, Any]]:
        """What may become of lists over blocks, last of all nothing.

        Those beside the number of a stack's blocks are of that stack, and where two numbers lie together, of
        either.
        """
        pairs = list(zip(self.stacks, holders, strict=True))
        for counted in (True, False):
            for favoured in self.stacks:
                edits: dict[str, Any] = {}
                for stack, names in sorted(pairs, key=lambda pair: pair[0] is favoured):
                    sections = {name.rpartition(".")[0] for name in names}
                    fields = {n: v for n, v in self._fields.items() if n.rpartition(".")[0] in sections}
                    edits |= _entries(fields, stack.within(kept), stack.size)
                    if counted:
                        edits |= _places(fields, stack.within(kept), stack.size)
                yield edits
        yield {}

    def _choices(self) -> list[Holders]:
        """Fields for each stack that may hold the number of its blocks, those that differ in front."""
        each: list[list[tuple[str, ...]]] = []
        for stack in self.stacks:
            holding = [name for name, value in self._fields.items() if type(value) is int]
            holding = [name for name in holding if self._fields[name] == stack.size]
            each.append([tuple(names) for n in range(1, _TOGETHER + 1) for names in combinations(holding, n)])

        def shared(choice: Holders) -> int:
            return sum(map(len, choice)) - len({name for names in choice for name in names})

        return sorted(product(*each), key=shared)

    def _is(self, built: _Built, kept: tuple[int, ...], wanted: Shapes) -> bool:
        """Whether a model is the one at hand with these blocks."""
        if built.shapes != wanted:
            return False
        after = iter(built.outlines)
        return all(
            self._same(number, place, next(after), len(stack.within(kept)))
            for place, stack in enumerate(self.stacks)
            for number in kept
            if number in stack.numbers
        )

    def _same(self, number: int, place: int, after: Outline, staying: int) -> bool:
        """Whether a block is built alike in its new place, in a stack of so many."""
        before = self._outlines[number]
        if before.keys() != after.keys():
            return False
        for key, value in before.items():
            counts = (value, after[key]) == (self.stacks[place].size, staying)
            if key not in self._numbers[place] and value != after[key] and not counts:
                self._refuse(
                    f"block {self.words([number])} would have other settings in its new place "
                    f"({key}: {after[key]}, not {value})"
                )
                return False
        return True


def plan_depth(size: Size, source: Artifact, run: Run) -> DepthPlan:
    """Settle how many blocks stay, and that there is a configuration for some selection of them.

    Raises:
        PlanError: no block would go, or no configuration has fewer blocks.
    """
    return _planned(size, source.path, source.digest, run.task, run.trust_remote_code)


@lru_cache(maxsize=4)
def _planned(size: Size, path: Path, digest: str, task: str, trust_remote_code: bool) -> DepthPlan:
    """The plan of a model with this digest: what is checked before a run is not found out again in it."""
    del digest  # tells one model from another at the same path
    plan = DepthPlan(Artifact.open(path), Run(task=task, trust_remote_code=trust_remote_code), size)
    if any(plan.fits(windows) for windows in _ends(plan)):
        return plan
    if not size.contiguous and one_by_one(plan, range(len(plan.blocks))) is not None:
        return plan
    raise PlanError(
        f"{plan.gone} of the {len(plan.blocks)} blocks cannot be taken out: {plan.refusal}",
        "ask for another number with --layers, or prune its width with prune.width",
    )


def _ends(plan: DepthPlan) -> Iterator[list[int]]:
    """Neighbours of every stack, from the last ones to the first."""
    for back in range(max(stack.stay for stack in plan.stacks) + 1):
        starts = [max(stack.first, stack.first + stack.stay - back) for stack in plan.stacks]
        windows = (stack.window(start) for stack, start in zip(plan.stacks, starts, strict=True))
        yield [number for window in windows for number in window]


def one_by_one(plan: DepthPlan, order: Sequence[int]) -> tuple[int, ...] | None:
    """As many blocks as have to go, each the first in an order that a configuration can do without.

    Args:
        order: numbers of all blocks, the one that should go first in front.

    Returns:
        their numbers, rising, or ``None`` where some configuration on the way does not exist.
    """
    gone: list[int] = []
    while len(gone) < plan.gone:
        left = (number for number in order if plan.open(gone, number))
        found = next((number for number in left if plan.fits([*gone, number])), None)
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


def _inside(name: str, block: str) -> bool:
    return name.startswith(f"{block}.")


def _plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(isinstance(entry, _PLAIN) for entry in value)
    return isinstance(value, _PLAIN)


def _numbers(outlines: Sequence[Outline]) -> frozenset[str]:
    """Settings that count the blocks, from zero or from elsewhere: they change with a block's place."""
    if len(outlines) == 1:
        return frozenset()
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
