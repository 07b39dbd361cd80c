"""One budget spread over channels, heads, the hidden size and blocks, by making models and measuring them.

What a channel costs the model cannot be told from its size, and what several cuts do together cannot be told
from what each does alone. So the search makes what it compares. Each *trial* is a number of blocks and a
direction: shares in which MLP channels, heads and channels of the hidden state go. It is followed until the
budget is kept, the model is cut so and its loss on text is measured. The first trials are the single methods
and even mixtures of them; the next lie around the best. The best of all is the result, so on the text that
it is measured on no single method is better.
"""

import itertools
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Final, final

import torch

from compress.core.artifact import Artifact
from compress.core.budget import SizeBudget
from compress.core.errors import CalibrationError, PlanError
from compress.core.passes import Meant, Needs, Outcome
from compress.core.run import RESUMABLE, Run
from compress.models.blocks import find_blocks
from compress.models.checkpoint import Checkpoint
from compress.models.load import loaded_dtype, skeleton
from compress.sweep.decode_prediction import decode_prediction, read_bytes
from compress.sweep.depth_loss import model_loss
from compress.sweep.depth_plan import Size
from compress.sweep.narrow_plan import Asked, looked_at, plan_narrowing
from compress.sweep.narrowing import How, narrow
from compress.sweep.narrowing import check as check_narrowing
from compress.sweep.shortening import Shorter, shorten
from compress.sweep.walk import Walk, placed_skeleton

_FILE: Final = "trials.jsonl"
_FOLDER: Final = "trials"
_HALVINGS: Final = 7
"""How finely a direction is followed: to a hundredth of the whole way."""
_SLACK: Final = 1e-9
_FIRST: Final = (
    (1.0, 0.0, 0.0),
    (0.0, 1.0, 0.0),
    (0.0, 0.0, 1.0),
    (1.0, 1.0, 0.0),
    (1.0, 1.0, 1.0),
    (1.0, 0.5, 0.0),
    (1.0, 0.0, 0.5),
    (1.0, 0.5, 0.25),
)
"""Directions of the first trials with all blocks: how fast MLP channels, heads, hidden channels go."""
_WITH_FEWER_BLOCKS: Final = ((0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (1.0, 0.5, 0.0), (1.0, 1.0, 1.0))
_DEPTHS: Final = 3
"""How many numbers of blocks are tried at first, beside all of them."""


@dataclass(frozen=True)
class Spent:
    """What is asked of a search.

    Attributes:
        budget: what the model may take.
        trials: models that are made and measured, at most.
        samples: sequences that their loss is measured on, at most.
        multiple: what channels and hidden sizes are a multiple of; ``None`` chooses one that kernels like.
    """

    budget: SizeBudget
    trials: int
    samples: int
    multiple: int | None


@dataclass(frozen=True)
class Trial:
    """One way to keep to the budget.

    Attributes:
        blocks: that stay.
        direction: how fast MLP channels, heads and hidden channels go.
        shares: of these that stay.
        cost: what it comes to, in the units of the budget; of speed its inverse.
    """

    blocks: int
    direction: tuple[float, float, float]
    shares: tuple[float, float, float]
    cost: float

    @property
    def narrows(self) -> bool:
        """Whether anything goes beside blocks."""
        return min(self.shares) < 1

    @property
    def key(self) -> str:
        """What tells it from others: trials of other directions may come to the same model."""
        return f"{self.blocks} " + " ".join(f"{share:.6g}" for share in self.shares)


def check(spent: Spent, how: How, source: Artifact, run: Run) -> Needs:
    """Refuse what cannot be cut or measured, and predict the work of all trials.

    Raises:
        PlanError: no way of cutting keeps to the budget, or calibration text is missing.
    """
    if run.calibration is None:
        raise PlanError("the method needs calibration text", "give --calibration TEXT or data.calibration")
    search = _Search(spent, how, source, source.path, run)
    first = list(search.first())
    if not first:
        raise PlanError(
            f"nothing that can be cut of {source.path} keeps to {spent.budget}: "
            f"{search.refusal or 'too much must go'}",
            "ask for a larger budget",
        )
    widest = next((trial for trial in first if trial.narrows), None)
    needs = Needs(0, 0, 0, 0.0)
    if widest is not None:
        needs = check_narrowing(search.asked(widest), how, source, run)
    # A trial is made, measured and let go; the blocks that do least are found in the whole model.
    model = search.model
    compute = 4 if run.device == "cpu" else loaded_dtype(source).itemsize
    whole = compute * sum(parameter.numel() for parameter in model.parameters())
    on_host = run.device == "cpu"
    return replace(
        needs,
        disk_bytes=3 * max(needs.disk_bytes, search.disk_bytes),
        host_bytes=needs.host_bytes + (whole if on_host else 0),
        device_bytes=0 if on_host else max(needs.device_bytes, whole),
        seconds=needs.seconds * (spent.trials + 1),
    )


def fit(spent: Spent, how: How, source: Artifact, target: Path, run: Run) -> Outcome:
    """Find the best way to keep to a budget, and cut the model so.

    Args:
        target: the folder that is written; it may hold earlier progress.

    Raises:
        PlanError: no way of cutting keeps to the budget.
    """
    search = _Search(spent, how, source, target, run)
    losses = search.measured()
    best = min(losses, key=lambda trial: (losses[trial], trial.cost))
    run.reporter.message(
        f"budget: {search.words(best)}; loss {losses[best]:.4f} on the calibration text, the best of "
        f"{len(losses)} trials"
    )
    outcome = search.make(best, target, run)
    made = Artifact.open(target)
    decisions = {
        "budget": str(spent.budget),
        "chosen": search.document(best, losses[best]),
        "trials": [
            search.document(trial, loss) for trial, loss in sorted(losses.items(), key=lambda entry: entry[1])
        ],
        **outcome.decisions,
        "decode": search.decode(made),
    }
    shutil.rmtree(run.scratch / _FOLDER, ignore_errors=True)
    return Outcome(decisions, outcome.tensors)


@final
class _Search:
    """Trials of one model."""

    def __init__(self, spent: Spent, how: How, source: Artifact, target: Path, run: Run) -> None:
        self._spent, self._how, self._source, self._run = spent, how, source, run
        self._target = target
        self.model = skeleton(source, task=run.task, trust_remote_code=run.trust_remote_code)
        self._blocks = [block.name for block in find_blocks(self.model)]
        stacks = {block.stack for block in find_blocks(self.model)}
        self._deep = len(stacks) == 1 and len(self._blocks) > 1
        checkpoint = Checkpoint(source, self.model)
        self._disk = {
            name: (checkpoint.target[name], checkpoint.dtype(name).itemsize, checkpoint.shape(name))
            for name in checkpoint.names
        }
        self._whole = looked_at(source, run).shapes
        self.refusal = ""
        self._limit = self._room()

    @property
    def disk_bytes(self) -> int:
        """Of the model as it is."""
        return sum(size * prod(shape) for _, size, shape in self._disk.values())

    # -- what a cut comes to -----------------------------------------------------------------------

    def _room(self) -> float:
        budget = self._spent.budget
        if budget.of == "share":
            return budget.limit * self._cost(self._whole, len(self._blocks))
        if budget.of == "speed":
            return self._cost(self._whole, len(self._blocks)) / budget.limit
        return budget.limit

    def _cost(self, shapes: Mapping[str, tuple[int, ...]], blocks: int) -> float:
        """Parameters of the body, bytes on disk, or bytes read for a token.

        Args:
            blocks: that stay; it is reckoned with the first ones, as blocks hardly differ in size.
        """
        gone = tuple(f"{name}." for name in self._blocks[blocks:])
        stays = {name: shape for name, shape in shapes.items() if not (gone and name.startswith(gone))}
        if self._spent.budget.of == "bytes":
            first = {id(p): name for name, p in self.model.named_parameters()}
            same = {n: first[id(p)] for n, p in self.model.named_parameters(remove_duplicate=False)}
            return float(
                sum(
                    size * prod(stays.get(same.get(target, target), shape))
                    for target, size, shape in self._disk.values()
                    if not gone or not target.startswith(gone)
                )
            )
        if self._spent.budget.of == "speed":
            return float(read_bytes(self.model, stays, loaded_dtype(self._source).itemsize))
        inside = tuple(f"{name}." for name in self._blocks)
        return float(sum(prod(shape) for name, shape in stays.items() if name.startswith(inside)))

    def asked(self, trial: Trial) -> Asked:
        """What a trial keeps, beside blocks."""
        mlp, heads, hidden = trial.shares
        return Asked(mlp, heads, self._spent.multiple, frozenset(), hidden)

    def _trial(self, blocks: int, direction: tuple[float, float, float]) -> Trial | None:
        """The trial of a direction that keeps to the budget and takes out the least; ``None`` for none."""
        if not any(direction):
            cost = self._cost(self._whole, blocks)
            return Trial(blocks, direction, (1.0, 1.0, 1.0), cost) if self._fits(cost) else None
        if self._fits(self._cost(self._whole, blocks)):
            return None
        low, high = 0.0, 1.0
        found: Trial | None = None
        for _ in range(_HALVINGS):
            way = (low + high) / 2
            mlp, heads, hidden = (max(1 - way * each, 1e-6) for each in direction)
            trial = Trial(blocks, direction, (mlp, heads, hidden), 0.0)
            planned = self._planned_cost(trial)
            if planned is not None and self._fits(planned):
                found, high = replace(trial, cost=planned), way
            else:
                low = way
        return found

    def _planned_cost(self, trial: Trial) -> float | None:
        try:
            plan = plan_narrowing(self.asked(trial), self._source, self._run)
        except PlanError as error:
            self.refusal = self.refusal or error.message
            return None
        return self._cost(plan.shapes, trial.blocks)

    def _fits(self, cost: float) -> bool:
        return cost <= self._limit * (1 + _SLACK)

    # -- which trials there are ----------------------------------------------------------------------

    def first(self) -> Iterator[Trial]:
        """Single methods and even mixtures that keep to the budget."""
        total = len(self._blocks)
        choices = [(total, direction) for direction in _FIRST]
        if self._deep:
            least = next((n for n in range(total - 1, 0, -1) if self._fits(self._cost(self._whole, n))), 0)
            between = total - max(least, 1)
            steps = min(between, _DEPTHS)
            depths = dict.fromkeys(total - math.ceil(between * (step + 1) / steps) for step in range(steps))
            choices += [(n, direction) for n in reversed(depths) for direction in _WITH_FEWER_BLOCKS]
        seen: set[str] = set()
        for blocks, direction in choices:
            trial = self._trial(blocks, direction)
            if trial is not None and trial.key not in seen:
                seen.add(trial.key)
                yield trial

    def _around(self, best: Trial) -> Iterator[Trial]:
        """Trials next to one: a block more or less, and each kind of cut faster or slower."""
        directions = [best.direction]
        for place, factor in itertools.product(range(3), (0.5, 1.5)):
            speed = best.direction[place] * factor if best.direction[place] else 0.25
            changed = (*best.direction[:place], speed, *best.direction[place + 1 :])
            directions.append((changed[0], changed[1], changed[2]))
        blocks = [best.blocks]
        if self._deep:
            blocks += [n for n in (best.blocks + 1, best.blocks - 1) if 0 < n <= len(self._blocks)]
        choices = [(best.blocks, direction) for direction in directions]
        choices += [(n, best.direction) for n in blocks[1:]]
        for number, direction in choices:
            trial = self._trial(number, direction)
            if trial is not None:
                yield trial

    def measured(self) -> dict[Trial, float]:
        """The loss of every trial that was made. What an earlier run measured is not measured again."""
        known = self._read()
        losses: dict[Trial, float] = {}
        keys: set[str] = set()
        title = f"trials of {self._spent.budget}"
        with self._run.reporter.progress(title, self._spent.trials, "trial") as advance:

            def measure(trials: Iterator[Trial]) -> None:
                for trial in trials:
                    if len(losses) == self._spent.trials:
                        return
                    if trial.key not in keys:
                        keys.add(trial.key)
                        loss = known[trial.key] if trial.key in known else self._loss(trial)
                        if loss is not None:
                            losses[trial] = loss
                        advance(1)

            measure(self.first())
            before = -1
            while losses and len(losses) not in (before, self._spent.trials):
                before = len(losses)
                measure(self._around(min(losses, key=lambda trial: (losses[trial], trial.cost))))
        if not losses:
            raise PlanError(
                f"no way of cutting keeps to {self._spent.budget}: {self.refusal or 'too much must go'}",
                "ask for a larger budget",
            )
        return losses

    # -- making and measuring one ------------------------------------------------------------------------

    def _loss(self, trial: Trial) -> float | None:
        """The loss of one trial, or ``None`` where it cannot be made."""
        folder = self._run.scratch / _FOLDER / trial.key.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        run = replace(self._run, scratch=folder / "scratch")
        (folder / "model").mkdir(parents=True)
        self._run.reporter.event("budget.trial", blocks=trial.blocks, shares=list(trial.shares))
        try:
            self.make(trial, folder / "model", run)
            loss: float | None = self._measured(Artifact.open(folder / "model"))
        except (PlanError, CalibrationError) as error:
            self._run.reporter.message(f"budget: {self.words(trial)} cannot be made: {error.message}")
            loss = None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        with (self._run.scratch / _FILE).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"trial": trial.key, "loss": loss}) + "\n")
        (self._run.scratch / RESUMABLE).touch()
        return loss

    def _read(self) -> dict[str, float | None]:
        """What an earlier run measured; a line that it did not finish is measured again."""
        file = self._run.scratch / _FILE
        found: dict[str, float | None] = {}
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
            try:
                document = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[document["trial"]] = document["loss"]
        return found

    def _measured(self, made: Artifact) -> float:
        """The loss of a model that was cut, held against the model as it was where the task has none."""
        calibration = self._run.calibration
        if calibration is None:
            raise PlanError("losses are measured on calibration text", "give --calibration TEXT")
        text = replace(calibration, samples=min(calibration.samples, self._spent.samples))
        # Another draw of the text than the one that channels are judged by.
        run = replace(self._run, calibration=text, seed=self._run.seed + 1)
        return model_loss(_walk(made, run), _walk(self._source, run))

    def make(self, trial: Trial, target: Path, run: Run) -> Outcome:
        """Cut the model as a trial says."""
        if trial.blocks == len(self._blocks):
            return narrow(self.asked(trial), self._how, self._source, target, run)
        asked = Shorter(Size(1.0, trial.blocks), "loss", self._how.repair, self._spent.samples)
        if not trial.narrows:
            return shorten(asked, self._source, target, run)
        shorter = run.scratch / "shorter"
        shorter.mkdir(parents=True, exist_ok=True)
        first = shorten(asked, self._source, shorter, replace(run, scratch=run.scratch / "depth"))
        then = replace(run, scratch=run.scratch / "width")
        second = narrow(self.asked(trial), self._how, Artifact.open(shorter), target, then)
        (run.scratch / RESUMABLE).touch()
        tensors = _as_moved(second.tensors, first.tensors)
        decisions = {
            **second.decisions,
            "blocks": first.decisions["blocks"],
            "config": {**first.decisions["config"], **second.decisions["config"]},
            "parameters": {
                "before": first.decisions["parameters"]["before"],
                "after": second.decisions["parameters"]["after"],
            },
            "changed": sum(meant.changed for meant in tensors.values()),
        }
        return Outcome(decisions, tensors)

    # -- words ---------------------------------------------------------------------------------------

    def words(self, trial: Trial) -> str:
        """A trial for a person."""
        mlp, heads, hidden = (f"{share:.0%}" for share in trial.shares)
        return (
            f"{trial.blocks} of {len(self._blocks)} blocks, MLP channels {mlp}, heads {heads}, "
            f"hidden size {hidden}"
        )

    def document(self, trial: Trial, loss: float) -> dict[str, Any]:
        """A trial for the lineage."""
        mlp, heads, hidden = (float(f"{share:.6g}") for share in trial.shares)
        shares = {"blocks": trial.blocks, "mlp": mlp, "heads": heads, "hidden": hidden}
        of_budget = float(f"{trial.cost / self._limit:.6g}")
        return {**shares, "cost": int(trial.cost), "of_budget": of_budget, "loss": float(f"{loss:.6g}")}

    def decode(self, made: Artifact) -> dict[str, Any]:
        """What is read for a token before and after."""
        size = loaded_dtype(self._source).itemsize
        after = skeleton(made, task=self._run.task, trust_remote_code=self._run.trust_remote_code)
        shapes = {name: tuple(parameter.shape) for name, parameter in after.named_parameters()}
        return decode_prediction(read_bytes(self.model, self._whole, size), read_bytes(after, shapes, size))


def _walk(source: Artifact, run: Run) -> Walk:
    model = placed_skeleton(source, run)
    return Walk(source, run.scratch, run, model, Checkpoint(source, model), torch.device(run.device))


def _as_moved(second: Mapping[str, Meant], first: Mapping[str, Meant]) -> dict[str, Meant]:
    """What was meant by two cuts in a row: what the second left is as the first meant it."""
    return {name: meant if meant.changed else first[name] for name, meant in second.items()}
