"""How much a model loses when blocks of it are left out, measured on its output.

Block after block is left out alone, the model is run on calibration text, and the block without which it
loses least goes; then again without it, until enough are gone (Kim et al. 2024, "Shortened LLaMA",
arXiv 2402.02834, section 3.1, who measure once and not again after each block). Neighbours that go together
are left out together, each run of them once. The loss is that of the next token where a model predicts one; a
classifier is measured by the divergence from what it said before, an encoder by the cosine to it. A decoder
that reads the same text as its encoder finds the next token there, so it is measured by the divergence too.

Blocks before the one that is left out are not run again: the model is re-entered there. All others run for
every measurement, so the whole model is in memory, in the precision in which blocks are computed.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, final

import torch

from compress.core.errors import CalibrationError, PlanError
from compress.core.run import RESUMABLE
from compress.models.blocks import Block, Recording, Reentry
from compress.models.tasks import FeatureExtraction, Task, TextGeneration, resolve
from compress.numerics.criterion import Criterion
from compress.numerics.divergence import imitation
from compress.sweep.activations import Activations
from compress.sweep.depth_choice import Judgement, best_windows, dispensable, ranked, windows
from compress.sweep.depth_plan import DepthPlan
from compress.sweep.depth_scan import given_to
from compress.sweep.narrow_cuts import ranges
from compress.sweep.walk import Walk

_FILE: Final = "losses.jsonl"


def judge_by_loss(walk: Walk, plan: DepthPlan) -> Judgement:
    """Measure losses and choose the blocks that go.

    What is measured is kept in ``run.scratch`` and not measured again.

    Args:
        walk: the model before the cut; its weights are let go again.
        plan: how many go, and whether they must be neighbours.

    Raises:
        CalibrationError: the model's own loss is not finite.
        PlanError: the run has no calibration text, or there is no configuration for any selection.
    """
    return _Losses(walk).judge(plan)


def losses_alone(walk: Walk) -> tuple[float, dict[int, float]]:
    """The loss of a model, and its loss without each block alone.

    What is measured is kept in ``run.scratch`` and not measured again.

    Args:
        walk: the model; its weights are let go again.

    Returns:
        the loss as it is, which is 0 where losses are distances to it, and the others by number of block;
        infinite where the model without a block says nothing that is finite.

    Raises:
        CalibrationError: the model's own loss is not finite.
        PlanError: the run has no calibration text.
    """
    return _Losses(walk).alone()


@final
class _Losses:
    """One model in memory, and what was measured of it."""

    def __init__(self, walk: Walk) -> None:
        self._walk = walk
        self._task = resolve(walk.run.task, walk.source.config)
        self._file = walk.run.scratch / _FILE
        self._known: dict[tuple[int, ...], float] = {}
        self._tuples: frozenset[int] = frozenset()

    def judge(self, plan: DepthPlan) -> Judgement:
        """Measure and choose."""
        with self._running() as (reentry, activations):
            tokens = sum(batch["input_ids"].numel() for batch in activations.batches)
            _, wanted = self._whole(reentry, activations)
            if plan.contiguous:
                losses = self._windows(plan, reentry, activations, wanted)
                return Judgement(best_windows(losses, plan), "loss", {}, losses, tokens)
            gone, alone = self._greedily(plan, reentry, activations, wanted)
            return Judgement(gone, "loss", alone, {}, tokens)

    def alone(self) -> tuple[float, dict[int, float]]:
        """Measure the model as it is and without each block."""
        total = len(self._walk.blocks)
        title = f"loss without each of {total} blocks"
        with (
            self._running() as (reentry, activations),
            self._walk.run.reporter.progress(title, total, "block") as advance,
        ):
            whole, wanted = self._whole(reentry, activations)
            losses = {}
            choices = [(number,) for number in range(total)]
            for choice, loss in self._without_each(choices, (), reentry, activations, wanted):
                losses[choice[0]] = loss
                advance(1)
            return whole, losses

    @contextmanager
    def _running(self) -> Iterator[tuple[Reentry, Activations]]:
        """The whole model in memory while the context lasts, and the text."""
        walk = self._walk
        activations = walk.calibration()
        if activations is None:
            raise PlanError("losses are measured on calibration text", "give --calibration TEXT")
        walk.begin()
        self._known = self._read()
        walk.checkpoint.load(walk.checkpoint.names, walk.device)
        walk.model.tie_weights()
        walk.checkpoint.require_filled("")
        with walk.reentry() as reentry:
            yield reentry, activations
        walk.checkpoint.release("")

    # -- what to measure ---------------------------------------------------------------------------

    def _greedily(
        self, plan: DepthPlan, reentry: Reentry, activations: Activations, wanted: Sequence[torch.Tensor]
    ) -> tuple[tuple[int, ...], dict[int, float]]:
        """The blocks that go one after the other, and the loss without each of them alone."""
        total = len(self._walk.blocks)
        gone: list[int] = []
        alone: dict[int, float] = {}
        title = f"loss without each of {total} blocks"
        rounds = sum(total - place for place in range(plan.gone))
        with self._walk.run.reporter.progress(title, rounds, "block") as advance:
            while len(gone) < plan.gone:
                left = [number for number in range(total) if plan.open(gone, number)]
                losses = {}
                for number, loss in self._without_each(
                    [(number,) for number in left], gone, reentry, activations, wanted
                ):
                    losses[number[0]] = loss
                    advance(1)
                alone = alone or losses
                fitting = next((n for n in ranked(losses) if plan.fits([*gone, n])), None)
                if fitting is None:
                    # Not every number of blocks can be said: those that matter least alone decide.
                    return dispensable(alone, plan), alone
                gone.append(fitting)
        return tuple(sorted(gone)), alone

    def _windows(
        self, plan: DepthPlan, reentry: Reentry, activations: Activations, wanted: Sequence[torch.Tensor]
    ) -> dict[int, float]:
        """The loss without each run of neighbours that may go, by the first of them."""
        choices = windows(plan)
        count = " and ".join(str(stack.gone) for stack in plan.stacks if stack.gone)
        title = f"loss without each {count} neighbours of {len(self._walk.blocks)} blocks"
        losses = {}
        with self._walk.run.reporter.progress(title, len(choices), "window") as advance:
            for choice, loss in self._without_each(choices, (), reentry, activations, wanted):
                losses[choice[0]] = loss
                advance(1)
        return losses

    # -- how it is measured ------------------------------------------------------------------------

    def _whole(self, reentry: Reentry, activations: Activations) -> tuple[float, list[torch.Tensor]]:
        """The loss of the untouched model, and what it says, where losses compare with it.

        Raises:
            CalibrationError: its own loss is not finite.
        """
        blocks = self._walk.blocks
        recording = Recording()
        for block in blocks:
            reentry.advance(block.position, activations.batches[0], recording)
        self._tuples = frozenset(recording.extras)
        said: list[torch.Tensor] = []
        total, sequences = 0.0, 0
        for batch in activations.batches:
            outputs = self._said(reentry, 0, batch, Recording())
            loss, count = self._loss(outputs, batch, outputs), len(batch["input_ids"])
            total, sequences = total + count * loss, sequences + count
            if not math.isfinite(loss):
                raise CalibrationError(
                    "the model's own loss on the calibration text is not finite",
                    "check that the model is sound in this dtype",
                )
            if not isinstance(self._task, TextGeneration):
                said.append(outputs)
        return total / sequences, said

    def _without_each(
        self,
        choices: Iterable[tuple[int, ...]],
        gone: Sequence[int],
        reentry: Reentry,
        activations: Activations,
        wanted: Sequence[torch.Tensor],
    ) -> Iterator[tuple[tuple[int, ...], float]]:
        """The loss without each choice of blocks, besides those that are gone already.

        Args:
            choices: in the order of their first blocks.
        """
        recordings = activations.beside()
        reached = 0
        blocks = self._walk.blocks
        with self._skipping([blocks[number] for number in gone]):
            for choice in choices:
                key = tuple(sorted([*gone, *choice]))
                if key not in self._known:
                    self._walk.run.reporter.event("depth.measure", without=ranges(key))
                    for block in blocks[reached : choice[0]]:
                        if block.position not in gone:
                            for batch, recording in zip(activations.batches, recordings, strict=True):
                                reentry.advance(block.position, batch, recording)
                    reached = max(reached, choice[0])
                    with self._skipping([blocks[number] for number in choice]):
                        self._keep(key, self._mean(choice[0], reentry, activations, recordings, wanted))
                yield choice, self._known[key]

    def _mean(
        self,
        position: int,
        reentry: Reentry,
        activations: Activations,
        recordings: Sequence[Recording],
        wanted: Sequence[torch.Tensor],
    ) -> float:
        """The mean loss over all sequences, with the model re-entered at a block."""
        total, sequences = 0.0, 0
        for place, (batch, recording) in enumerate(zip(activations.batches, recordings, strict=True)):
            said = self._said(reentry, position, batch, recording)
            count = len(batch["input_ids"])
            total += count * self._loss(said, batch, wanted[place] if wanted else said)
            sequences += count
        return total / sequences

    def _said(
        self, reentry: Reentry, position: int, batch: Mapping[str, torch.Tensor], recording: Recording
    ) -> torch.Tensor:
        return self._task.outputs(reentry.finish(position, batch, recording))

    def _loss(self, said: torch.Tensor, batch: Mapping[str, torch.Tensor], wanted: torch.Tensor) -> float:
        return _loss_of(self._task, said, batch["input_ids"].to(said.device), wanted)

    @contextmanager
    def _skipping(self, blocks: Sequence[Block]) -> Iterator[None]:
        """Leave blocks out while the context lasts: each hands on what it is given."""
        before = [block.module.forward for block in blocks]
        for block in blocks:
            block.module.forward = _handing_on(block, block.position in self._tuples)
        try:
            yield
        finally:
            for block, forward in zip(blocks, before, strict=True):
                block.module.forward = forward

    # -- what is kept ------------------------------------------------------------------------------

    def _keep(self, gone: tuple[int, ...], loss: float) -> None:
        # A model without one block may say anything; what is not finite goes last, and is no number in JSON.
        loss = loss if math.isfinite(loss) else float("inf")
        with self._file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"without": gone, "loss": None if math.isinf(loss) else loss}) + "\n")
        (self._walk.run.scratch / RESUMABLE).touch()
        self._known[gone] = loss

    def _read(self) -> dict[tuple[int, ...], float]:
        """What an earlier run measured; a line that it did not finish is measured again."""
        found: dict[tuple[int, ...], float] = {}
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.is_file() else []
        for line in lines:
            try:
                document = json.loads(line)
            except json.JSONDecodeError:
                continue
            loss = document["loss"]
            found[tuple(document["without"])] = float("inf") if loss is None else float(loss)
        return found


def model_loss(walk: Walk, original: Walk) -> float:
    """The mean loss of a model on its calibration text, one block in memory at a time.

    Args:
        walk: the model; its weights are let go again.
        original: what it is compared with where its task has no loss on plain text.

    Returns:
        infinity where it is not finite.
    """
    task = resolve(walk.run.task, walk.source.config)
    total, sequences = 0.0, 0
    if isinstance(task, TextGeneration):
        pairs = ((tokens, said, said) for tokens, said in _streamed(walk, task))
    else:
        both = zip(_streamed(walk, task), _streamed(original, task), strict=True)
        pairs = ((tokens, said, wanted) for (tokens, said), (_, wanted) in both)
    for tokens, said, wanted in pairs:
        total += len(tokens) * _loss_of(task, said, tokens, wanted)
        sequences += len(tokens)
    mean = total / sequences
    return mean if math.isfinite(mean) else float("inf")


def _streamed(walk: Walk, task: Task) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The tokens of each batch, and what the model says of them."""
    activations = walk.calibration()
    if activations is None:
        raise PlanError("losses are measured on calibration text", "give --calibration TEXT")
    with walk.reentry() as reentry:
        walk.load_outside()
        walk.load_head()
        for block in walk.blocks:
            walk.checkpoint.load_module(block.name, walk.device)
            for batch, recording in zip(activations.batches, activations.recordings, strict=True):
                reentry.advance(block.position, batch, recording)
            walk.checkpoint.release(block.name)
        for batch, recording in zip(activations.batches, activations.recordings, strict=True):
            said = task.outputs(reentry.run(len(walk.blocks), batch, recording))
            yield batch["input_ids"].to(said.device), said
    walk.checkpoint.release("")


def _handing_on(block: Block, beside: bool) -> Callable[..., Any]:
    """A block that adds nothing to the hidden state.

    Args:
        beside: whether it returns something beside the hidden state, which others may want of it: the first
            block of T5 computes the bias of relative positions for all of them, so it runs for that.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = given_to(args, kwargs)
        if not beside:
            return hidden
        # It may add in place to what it is given.
        hidden = hidden.clone()
        return (hidden, *type(block.module).forward(block.module, *args, **kwargs)[1:])

    return forward


def _loss_of(task: Task, said: torch.Tensor, tokens: torch.Tensor, wanted: torch.Tensor) -> float:
    """The loss of one batch.

    Args:
        tokens: that went in.
        wanted: what the untouched model says.
    """
    if isinstance(task, TextGeneration):
        return float(task.loss(said, tokens))
    if isinstance(task, FeatureExtraction):
        return float(task.loss(said, wanted))
    rows = torch.zeros(said.flatten(0, -2).shape[0], dtype=torch.int64, device=said.device)
    found = imitation(said.flatten(0, -2), wanted.flatten(0, -2), rows, Criterion())
    return float(found.loss.mean())
