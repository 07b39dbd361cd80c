"""The one optimisation loop: AdamW over windows of tokens, judged on held-out text, resumable to the bit.

A plain loop over torch, on one device or on one a process. The order of the data and the random state of a
step are functions of the seed and the step alone, so that a checkpoint needs nothing but tensors and two
numbers, and a run that was killed goes on with the losses that it would have had.

The windows of a step are shared by the processes that train together, and their gradients are added up
before they are clipped (`compress.training.processes`). So a step means the same in any number of processes,
up to the rounding of sums, and a run may go on in another number of them. Only the first of them writes.
"""

import hashlib
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from compress.core.errors import CalibrationError, PlanError
from compress.core.run import Run
from compress.data.training import TrainingText, permutation
from compress.training.checkpoints import Checkpoints, Position
from compress.training.history import History
from compress.training.integers import Latent
from compress.training.log import opened
from compress.training.objective import Losses, Objective
from compress.training.processes import Processes, Released
from compress.training.recomputation import recomputed
from compress.training.schedule import learning_rate
from compress.training.trainer import Trainer

BETAS = (0.9, 0.95)
"""Of AdamW. The second is lower than its default: short trainings never forget their first gradients."""


@dataclass(frozen=True)
class Trained:
    """What a training came to.

    Attributes:
        steps: that were done.
        kept: step whose weights the model now has; 0 for the model as it came.
        zeros: weights that were held at zero.
        best: step after which the validation loss was least.
        history: of all steps.
    """

    steps: int
    kept: int
    zeros: int
    best: int
    history: History


class Batches:
    """Which windows a step learns from: all of them in a new random order, then again in another.

    Args:
        windows: int64 ``[windows, length]``.
        count: windows in one step.
        seed: of the orders.
    """

    def __init__(self, windows: torch.Tensor, count: int, seed: int) -> None:
        self._windows = windows
        self._count = count
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def of(self, step: int) -> torch.Tensor:
        """The windows of a step, int64 ``[count, length]``; the same whenever it is asked."""
        numbers = range(step * self._count, (step + 1) * self._count)
        return self._windows[[self._row(number) for number in numbers]]

    def _row(self, number: int) -> int:
        epoch, place = divmod(number, len(self._windows))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = permutation(f"epoch {epoch} of seed {self._seed}", len(self._windows))
        return self._order[place]


class Loop:
    """Trains one model, in this process or in all that torch's process group holds.

    Args:
        model: with float32 weights, on its device.
        objective: what is learned.
        text: what it is learned from.
        numbers: of the optimisation.
        run: the circumstances.
        beside: what is trained together with the model and thrown away in the end (projections), if anything.

    Raises:
        PlanError: there are more processes than windows in a step.
    """

    def __init__(
        self,
        model: Any,
        objective: Objective,
        text: TrainingText,
        numbers: Trainer,
        run: Run,
        beside: torch.nn.Module | None = None,
    ) -> None:
        self._processes = Processes()
        if self._processes.count > numbers.batch * numbers.accumulation:
            raise PlanError(
                f"{self._processes.count} processes cannot share the {numbers.batch * numbers.accumulation} "
                f"windows of a step (batch {numbers.batch} x accumulation {numbers.accumulation})",
                f"raise --batch or --accumulation, or start at most {numbers.batch * numbers.accumulation}",
            )
        self._model = model
        self._objective = objective
        self._text = text
        self._numbers = numbers
        self._run = run
        self._device = torch.device(run.device)
        # A tied weight has one name here, and is trained once.
        self._parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        # Taken from the weights as they came, before any checkpoint is taken up.
        self._kept = _nonzero(self._parameters) if numbers.zeros == "keep" else {}
        if beside is not None:
            self._parameters |= {f"beside.{name}": weight for name, weight in beside.named_parameters()}
        self._optimiser = _adamw(self._parameters, numbers)
        self._checkpoints = Checkpoints(run.scratch, self._parameters, self._optimiser, run.reporter)
        self._batches = Batches(text.windows, numbers.batch * numbers.accumulation, run.seed)

    def train(self) -> Trained:
        """Train from the last checkpoint, or from the start, and leave the weights to keep in the model.

        Raises:
            CalibrationError: a loss or a gradient is no longer finite.
            EnvironmentFault: another of the processes is gone.
            Released: this process only helped, and has nothing more to do.
        """
        with ExitStack() as stack:
            if self._numbers.activations == "recompute":
                stack.enter_context(recomputed(self._model))
            position = self._start()
            if not self._over(position):
                position = self._steps(position)
        if not self._processes.leads:
            raise Released
        kept = position.best if self._numbers.keep == "best" else position.step
        if 0 < kept < position.step:
            self._checkpoints.load_best(kept)
        zeros = sum(int(mask.logical_not().sum()) for mask in self._kept.values())
        return Trained(position.step, kept, zeros, position.best, position.history)

    def _steps(self, position: Position) -> Position:
        """All steps from a position to the end."""
        remaining = (self._numbers.steps - position.step) * self._numbers.step_tokens
        saved_at, saved_step = time.monotonic(), position.step
        service = self._run.log if self._processes.leads else None
        with (
            opened(service, self._run, self._numbers, position.step) as log,
            self._run.reporter.progress("training", remaining, "token") as advance,
        ):
            if position.step == 0:
                log.write(position.history.rows[0])
            over = False
            while not over:
                position = self._advance(position)
                log.write(position.history.rows[-1])
                advance(self._numbers.step_tokens)
                over = self._over(position)
                due = over or self._due(position.step - saved_step, time.monotonic() - saved_at)
                if due and self._processes.leads:
                    self._checkpoints.save(position)
                    saved_at, saved_step = time.monotonic(), position.step
        if position.step < self._numbers.steps:
            self._run.reporter.message(
                f"stopped after step {position.step} of {self._numbers.steps}: no evaluation since step "
                f"{position.best} was better"
            )
        return position

    def _over(self, position: Position) -> bool:
        """Whether all steps are done, or patience is at its end; known from what a checkpoint holds."""
        patience = self._numbers.patience
        return position.step == self._numbers.steps or (
            patience is not None and position.history.evaluations_after(position.best) >= patience
        )

    def _start(self) -> Position:
        torch.manual_seed(self._run.seed)
        position = self._checkpoints.restore(self._objective.names)
        if position is not None:
            self._run.reporter.event("training.resume", step=position.step)
            self._run.reporter.message(f"going on after step {position.step} of {self._numbers.steps}")
            return position
        history = History(self._objective.names)
        history.judged(0, self._judge(0))
        return Position(0, 0, history)

    def _advance(self, position: Position) -> Position:
        """One step, and what follows it."""
        numbers, history, steps = self._numbers, position.history, self._numbers.steps
        rate = learning_rate(position.step, steps, numbers.learning_rate, numbers.warmup, numbers.floor)
        done = position.step + 1
        self._run.reporter.event("training.step", step=done)
        means, norm = self._step(position.step, rate)
        history.add(done, tokens=done * numbers.step_tokens, learning_rate=rate, gradient_norm=norm, **means)
        best = position.best
        if done == steps or done % numbers.evaluation_interval == 0:
            judged = self._judge(done)
            history.judged(done, judged)
            if judged["loss"] < history.evaluation(best)["loss"]:
                best = done
                if numbers.keep == "best" and done < steps and self._processes.leads:
                    self._checkpoints.save_best(done)
        newest = history.evaluation(done)
        judgement = f", validation {newest['loss']:.4f}" if newest else ""
        self._run.reporter.event("progress.note", text=f"loss {means['loss']:.4f}{judgement}")
        return replace(position, step=done, best=best)

    def _step(self, step: int, rate: float) -> tuple[dict[str, float], float]:
        """Update the weights once; the mean losses before the update, and the norm of their gradient."""
        torch.manual_seed(_seed(self._run.seed, step, self._processes.rank))
        windows = self._batches.of(step)
        positions = self._objective.positions(windows)
        self._optimiser.zero_grad(set_to_none=True)
        total: Losses | None = None
        for part in self._processes.share(windows).to(self._device).split(self._numbers.batch):
            losses = self._objective.learn(part, positions)
            total = losses if total is None else total.plus(losses)
        self._processes.add_up(list(self._parameters.values()))
        for name, kept in self._kept.items():
            gradient = self._parameters[name].grad
            # Without a gradient there are no moments, so that a zero stays exactly zero.
            if gradient is not None:
                gradient.mul_(kept)
        norm = self._clip()
        means = self._means(total)
        if not (math.isfinite(norm) and all(map(math.isfinite, means.values()))):
            raise CalibrationError(
                f"training diverged in step {step + 1}: loss {means['loss']}, norm of the gradient {norm}",
                "lower --learning-rate, raise --warmup, or give --precision float32",
            )
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()
        return means, norm

    def _clip(self) -> float:
        """The norm of the whole gradient, which is scaled down where that is above the limit."""
        weights = [weight for weight in self._parameters.values() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        # Its value is needed in any case, and below the limit nothing has to be read again.
        if float(norm) > (self._numbers.clip or math.inf):
            torch.nn.utils.clip_grads_with_norm_(weights, self._numbers.clip, norm)
        return float(norm)

    def _judge(self, step: int) -> dict[str, float]:
        self._run.reporter.event("training.evaluate", step=step)
        total: Losses | None = None
        for part in self._processes.share(self._text.held_out).split(self._numbers.batch):
            # A share may be empty where there are more processes than windows.
            if len(part):
                losses = self._objective.judge(part.to(self._device))
                total = losses if total is None else total.plus(losses)
        means = self._means(total)
        if not all(map(math.isfinite, means.values())):
            raise CalibrationError(
                f"after step {step} the validation loss is {means['loss']}",
                "lower --learning-rate" if step else "do model and teacher compute finite numbers?",
            )
        return means

    def _means(self, losses: Losses | None) -> dict[str, float]:
        """Nats a position, over what all processes saw."""
        return self._processes.total(losses, self._objective.names, self._device).means()

    def _due(self, steps: int, seconds: float) -> bool:
        every = self._numbers.checkpoint_steps
        if every is not None:
            return steps >= every
        return seconds >= (self._numbers.checkpoint_seconds or 0.0)


def _seed(seed: int, step: int, rank: int) -> int:
    """Of the random draws of a step in one process: a function of these numbers, so nothing is stored."""
    digest = hashlib.sha256(f"step {step} of seed {seed} in process {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _nonzero(parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Where matrices that hold zeros are not zero. A matrix of nothing else has only not begun to learn."""
    matrices = {name: weight for name, weight in parameters.items() if weight.dim() > 1}
    found = {
        name: weight.detach() != 0 for name, weight in matrices.items() if not isinstance(weight, Latent)
    }
    return {name: mask for name, mask in found.items() if mask.any() and not mask.all()}


def _adamw(parameters: dict[str, torch.nn.Parameter], numbers: Trainer) -> torch.optim.AdamW:
    """Decay for matrices alone: a norm or a bias that is drawn to zero is no simpler for it."""
    matrices = [weight for weight in parameters.values() if weight.dim() > 1]
    others = [weight for weight in parameters.values() if weight.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": numbers.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    # Fused, each weight with its gradient and moments is read once.
    return torch.optim.AdamW(filled, numbers.learning_rate, BETAS, fused=True)
