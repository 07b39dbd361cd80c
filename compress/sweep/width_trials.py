"""Ways to keep to a budget: so many blocks, and channels, heads and the hidden size cut together.

A trial is found before any weight is read: along a direction, which says how fast MLP channels, heads and the
hidden state go, by as little as keeps to the budget. The hidden state loses channels
(`compress.sweep.narrowing`) or its least principal components (`compress.sweep.slicing`), never both.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Final, final

from compress.core.artifact import Artifact
from compress.core.budget import SizeBudget
from compress.core.errors import PlanError
from compress.core.run import Run
from compress.models.blocks import find_blocks
from compress.models.checkpoint import Checkpoint
from compress.models.load import loaded_dtype, skeleton
from compress.sweep.decode_prediction import read_bytes
from compress.sweep.narrow_numbers import kernel_multiple, nearest_multiples
from compress.sweep.narrow_plan import Asked, looked_at, plan_narrowing
from compress.sweep.slice_plan import SlicePlan, Width, plan_slicing, sliced_shapes

_HALVINGS: Final = 7
"""How finely a direction is followed: to a hundredth of the whole way."""
_SLACK: Final = 1e-9
_LEAST: Final = 1e-6
"""The least share that stays."""

Direction = tuple[float, float, float, float]
"""How fast MLP channels, heads, channels of the hidden state and its components go."""
Shares = tuple[float, float, float, float]
"""How much of each stays."""
Shapes = Mapping[str, tuple[int, ...]]

_FIRST: Final[tuple[Direction, ...]] = (
    (1.0, 0.0, 0.0, 0.0),
    (0.0, 1.0, 0.0, 0.0),
    (0.0, 0.0, 1.0, 0.0),
    (0.0, 0.0, 0.0, 1.0),
    (1.0, 1.0, 0.0, 0.0),
    (1.0, 1.0, 1.0, 0.0),
    (1.0, 0.5, 0.0, 0.0),
    (1.0, 0.0, 0.0, 1.0),
    (1.0, 1.0, 0.0, 1.0),
)
"""Directions of the first trials with all blocks."""
_WITH_FEWER_BLOCKS: Final[tuple[Direction, ...]] = (
    (0.0, 0.0, 0.0, 0.0),
    (1.0, 0.0, 0.0, 0.0),
    (1.0, 0.5, 0.0, 0.0),
    (0.0, 0.0, 0.0, 1.0),
)
_DEPTHS: Final = 3
"""How many numbers of blocks are tried at first, beside all of them."""


@dataclass(frozen=True)
class Trial:
    """One way to keep to the budget.

    Attributes:
        blocks: that stay.
        direction: how fast all else goes.
        shares: that stay.
        cost: what it comes to, in the units of the budget; of speed its inverse.
    """

    blocks: int
    direction: Direction
    shares: Shares
    cost: float

    @property
    def narrows(self) -> bool:
        """Whether channels or heads go."""
        return min(self.shares[:3]) < 1

    @property
    def slices(self) -> bool:
        """Whether components of the hidden state go."""
        return self.shares[3] < 1

    @property
    def key(self) -> str:
        """What tells it from others: trials of other directions may come to the same model."""
        return f"{self.blocks} " + " ".join(f"{share:.6g}" for share in self.shares)


@final
class Trials:
    """The ways of one model.

    Args:
        budget: what it may take.
        multiple: what channels and hidden sizes are a multiple of; ``None`` chooses one that kernels like.
        source: the model.
        run: its task.

    Attributes:
        model: the model, without values.
        blocks: the names of its blocks.
        whole: the shapes of its parameters.
        limit: of the cost of a trial.
        refusal: why something could not be cut, if so.
        disk_bytes: of the model as it is.
    """

    def __init__(self, budget: SizeBudget, multiple: int | None, source: Artifact, run: Run) -> None:
        self._budget, self._multiple, self._source, self._run = budget, multiple, source, run
        self.model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
        found = find_blocks(self.model)
        self.blocks = [block.name for block in found]
        self._deep = len({block.stack for block in found}) == 1 and len(self.blocks) > 1
        checkpoint = Checkpoint(source, self.model)
        self._disk = {
            name: (checkpoint.target[name], checkpoint.dtype(name).itemsize, checkpoint.shape(name))
            for name in checkpoint.names
        }
        self.disk_bytes = sum(size * prod(shape) for _, size, shape in self._disk.values())
        self.whole = looked_at(source, run).shapes
        self.refusal = ""
        self._stream = self._sliceable()
        self.limit = self._limit()

    # -- what a cut comes to -----------------------------------------------------------------------

    def _limit(self) -> float:
        as_it_is = self._cost(self.whole, len(self.blocks))
        if self._budget.of == "share":
            return self._budget.limit * as_it_is
        if self._budget.of == "speed":
            return as_it_is / self._budget.limit
        return self._budget.limit

    def _cost(self, shapes: Shapes, blocks: int) -> float:
        """Parameters of the body, bytes on disk, or bytes read for a token.

        Args:
            shapes: of all parameters, with all blocks.
            blocks: that stay; it is reckoned with the first ones, as blocks hardly differ in size.
        """
        gone = tuple(f"{name}." for name in self.blocks[blocks:])
        stays = {name: shape for name, shape in shapes.items() if not (gone and name.startswith(gone))}
        itemsize = loaded_dtype(self._source).itemsize
        if self._budget.of == "bytes":
            first = {id(p): name for name, p in self.model.named_parameters()}
            same = {n: first[id(p)] for n, p in self.model.named_parameters(remove_duplicate=False)}
            stored = sum(
                size * prod(stays.get(same.get(target, target), shape))
                for target, size, shape in self._disk.values()
                if not gone or not target.startswith(gone)
            )
            # A head that gets a weight of its own.
            added = sum(itemsize * prod(shape) for name, shape in stays.items() if name not in self.whole)
            return float(stored + added)
        if self._budget.of == "speed":
            return float(read_bytes(self.model, stays, itemsize))
        inside = tuple(f"{name}." for name in self.blocks)
        return float(sum(prod(shape) for name, shape in stays.items() if name.startswith(inside)))

    def _fits(self, cost: float) -> bool:
        return cost <= self.limit * (1 + _SLACK)

    def asked(self, trial: Trial) -> Asked:
        """The channels and heads that a trial keeps."""
        mlp, heads, hidden, _ = trial.shares
        return Asked(mlp, heads, self._multiple, frozenset(), hidden)

    def width(self, trial: Trial) -> Width:
        """The components of the hidden state that a trial keeps."""
        return Width(trial.shares[3], self._multiple)

    # -- one direction -----------------------------------------------------------------------------

    def _follow(self, blocks: int, direction: Direction) -> Trial | None:
        """The trial of a direction that keeps to the budget and takes out the least; ``None`` for none."""
        if not any(direction):
            cost = self._cost(self.whole, blocks)
            return Trial(blocks, direction, (1.0, 1.0, 1.0, 1.0), cost) if self._fits(cost) else None
        if (direction[2] and direction[3]) or self._fits(self._cost(self.whole, blocks)):
            return None
        low, high = 0.0, 1.0
        found: Trial | None = None
        for _ in range(_HALVINGS):
            way = (low + high) / 2
            mlp, heads, hidden, components = (max(1 - way * each, _LEAST) for each in direction)
            trial = Trial(blocks, direction, (mlp, heads, hidden, components), 0.0)
            planned = self._planned_cost(trial)
            if planned is not None and self._fits(planned):
                found, high = replace(trial, cost=planned), way
            else:
                low = way
        if found is None or not found.slices:
            return found
        # The class may refuse the number of components that was reckoned with.
        plan = self._slice_plan(self.width(found))
        if plan is None:
            return None
        exact = self._cost(self._joined(self._narrowed(found) or self.whole, plan.shapes), blocks)
        return replace(found, cost=exact) if self._fits(exact) else None

    def _planned_cost(self, trial: Trial) -> float | None:
        shapes = self._narrowed(trial) if trial.narrows else self.whole
        if shapes is None:
            return None
        if trial.slices:
            sliced = self._sliced(trial)
            if sliced is None:
                return None
            shapes = self._joined(shapes, sliced)
        return self._cost(shapes, trial.blocks)

    def _narrowed(self, trial: Trial) -> Shapes | None:
        if not trial.narrows:
            return None
        try:
            return plan_narrowing(self.asked(trial), self._source, self._run).shapes
        except PlanError as error:
            self.refusal = self.refusal or error.message
            return None

    def _sliced(self, trial: Trial) -> Shapes | None:
        """The shapes with the nearest number of components, whether the class accepts it or not."""
        if self._stream is None:
            return None
        width = self._stream.stream.width
        wanted = max(1, round(width * trial.shares[3]))
        multiple = self._multiple or kernel_multiple(width, wanted)
        kept = next(nearest_multiples(wanted, multiple, width), None)
        if kept is None or wanted >= width:
            return None
        return sliced_shapes(self.model, self._stream.stream, self._stream.untied, kept)

    def _joined(self, narrowed: Shapes, sliced: Shapes) -> Shapes:
        """The shapes after both: each takes other dimensions."""
        joined = {}
        for name, shape in sliced.items():
            before = self.whole.get(name, shape)
            entry = zip(before, narrowed.get(name, before), shape, strict=True)
            joined[name] = tuple(narrow if after == was else after for was, narrow, after in entry)
        return joined

    def _sliceable(self) -> SlicePlan | None:
        return self._slice_plan(Width(0.5, self._multiple))

    def _slice_plan(self, width: Width) -> SlicePlan | None:
        try:
            return plan_slicing(width, self._source, self._run)
        except PlanError as error:
            self.refusal = self.refusal or error.message
            return None

    # -- which trials there are ----------------------------------------------------------------------

    def first(self) -> Iterator[Trial]:
        """Single methods and even mixtures that keep to the budget."""
        total = len(self.blocks)
        choices = [(total, direction) for direction in _FIRST]
        if self._deep:
            least = next((n for n in range(total - 1, 0, -1) if self._fits(self._cost(self.whole, n))), 0)
            between = total - max(least, 1)
            steps = min(between, _DEPTHS)
            depths = dict.fromkeys(total - math.ceil(between * (step + 1) / steps) for step in range(steps))
            choices += [(n, direction) for n in reversed(depths) for direction in _WITH_FEWER_BLOCKS]
        seen: set[str] = set()
        for blocks, direction in choices:
            trial = self._follow(blocks, direction)
            if trial is not None and trial.key not in seen:
                seen.add(trial.key)
                yield trial

    def around(self, best: Trial) -> Iterator[Trial]:
        """Trials next to one: a block more or less, and each kind of cut faster or slower."""
        directions = [best.direction]
        for place, factor in itertools.product(range(len(best.direction)), (0.5, 1.5)):
            speeds = list(best.direction)
            speeds[place] = speeds[place] * factor if speeds[place] else 0.25
            mlp, heads, hidden, components = speeds
            directions.append((mlp, heads, hidden, components))
        blocks = [best.blocks]
        if self._deep:
            blocks += [n for n in (best.blocks + 1, best.blocks - 1) if 0 < n <= len(self.blocks)]
        choices = [(best.blocks, direction) for direction in directions]
        choices += [(n, best.direction) for n in blocks[1:]]
        for number, direction in choices:
            trial = self._follow(number, direction)
            if trial is not None:
                yield trial
