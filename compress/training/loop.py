"""The one optimisation loop: AdamW over windows of tokens, judged on held-out text, resumable to the bit.

A plain loop over torch, on one device. Accelerate would place models and scale gradients for several
devices; what a run needs here it takes away: its checkpoints are pickles, which this package does not write
or read, and its random state and order of data are spread over objects whose state is not ours to fix. Here
the order of the data is a function of the seed and the step alone, so that a checkpoint needs nothing but
tensors and two numbers, and a run that was killed goes on with the losses that it would have had. A process
a device would split `Batches.of` and add up the gradients before they are clipped; nothing else would change.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from compress.core.errors import CalibrationError
from compress.core.run import Run
from compress.data.training import TrainingText, permutation
from compress.training.checkpoints import Checkpoints, Position
from compress.training.history import History
from compress.training.objective import Losses, Objective
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
    """Trains one model.

    Args:
        model: with float32 weights, on its device.
        objective: what is learned.
        text: what it is learned from.
        numbers: of the optimisation.
        run: the circumstances.
        beside: what is trained together with the model and thrown away in the end (projections), if anything.
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
        """
        steps = self._numbers.steps
        position = self._start()
        remaining = (steps - position.step) * self._numbers.step_tokens
        saved_at, saved_step = time.monotonic(), position.step
        if position.step < steps:
            with self._run.reporter.progress("training", remaining, "token") as advance:
                while position.step < steps:
                    position = self._advance(position, steps)
                    advance(self._numbers.step_tokens)
                    last = position.step == steps
                    if last or self._due(position.step - saved_step, time.monotonic() - saved_at):
                        self._checkpoints.save(position)
                        saved_at, saved_step = time.monotonic(), position.step
        kept = position.best if self._numbers.keep == "best" else steps
        if 0 < kept < steps:
            self._checkpoints.load_best(kept)
        zeros = sum(int(mask.logical_not().sum()) for mask in self._kept.values())
        return Trained(steps, kept, zeros, position.best, position.history)

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

    def _advance(self, position: Position, steps: int) -> Position:
        """One step, and what follows it."""
        numbers, history = self._numbers, position.history
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
                if numbers.keep == "best" and done < steps:
                    self._checkpoints.save_best(done)
        newest = history.evaluation(done)
        judgement = f", validation {newest['loss']:.4f}" if newest else ""
        self._run.reporter.event("progress.note", text=f"loss {means['loss']:.4f}{judgement}")
        return replace(position, step=done, best=best)

    def _step(self, step: int, rate: float) -> tuple[dict[str, float], float]:
        """Update the weights once; the mean losses before the update, and the norm of their gradient."""
        numbers = self._numbers
        windows = self._batches.of(step).to(self._device)
        positions = self._objective.positions(windows)
        self._optimiser.zero_grad(set_to_none=True)
        total: Losses | None = None
        for part in windows.split(numbers.batch):
            losses = self._objective.learn(part, positions)
            total = losses if total is None else total.plus(losses)
        for name, kept in self._kept.items():
            gradient = self._parameters[name].grad
            # Without a gradient there are no moments, so that a zero stays exactly zero.
            if gradient is not None:
                gradient.mul_(kept)
        norm = float(self._clip())
        means = total.means() if total is not None else {}
        if not (math.isfinite(norm) and all(map(math.isfinite, means.values()))):
            raise CalibrationError(
                f"training diverged in step {step + 1}: loss {means['loss']}, norm of the gradient {norm}",
                "lower --learning-rate, raise --warmup, or give --precision float32",
            )
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()
        return means, norm

    def _clip(self) -> torch.Tensor:
        """The norm of the whole gradient, which is scaled down where that is above the limit."""
        limit = self._numbers.clip or math.inf
        weights = [weight for weight in self._parameters.values() if weight.grad is not None]
        return torch.nn.utils.clip_grad_norm_(weights, limit)

    def _judge(self, step: int) -> dict[str, float]:
        self._run.reporter.event("training.evaluate", step=step)
        total: Losses | None = None
        for part in self._text.held_out.split(self._numbers.batch):
            losses = self._objective.judge(part.to(self._device))
            total = losses if total is None else total.plus(losses)
        means = total.means() if total is not None else {}
        if not all(map(math.isfinite, means.values())):
            raise CalibrationError(
                f"after step {step} the validation loss is {means['loss']}",
                "lower --learning-rate" if step else "do model and teacher compute finite numbers?",
            )
        return means

    def _due(self, steps: int, seconds: float) -> bool:
        every = self._numbers.checkpoint_steps
        if every is not None:
            return steps >= every
        return seconds >= (self._numbers.checkpoint_seconds or 0.0)


def _nonzero(parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Where matrices that hold zeros are not zero. A matrix of nothing else has only not begun to learn."""
    found = {name: weight.detach() != 0 for name, weight in parameters.items() if weight.dim() > 1}
    return {name: mask for name, mask in found.items() if mask.any() and not mask.all()}


def _adamw(parameters: dict[str, torch.nn.Parameter], numbers: Trainer) -> torch.optim.AdamW:
    """Decay for matrices alone: a norm or a bias that is drawn to zero is no simpler for it."""
    matrices = [weight for weight in parameters.values() if weight.dim() > 1]
    others = [weight for weight in parameters.values() if weight.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": numbers.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], numbers.learning_rate, BETAS)
