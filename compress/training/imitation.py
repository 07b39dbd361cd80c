"""The objective of distillation from next-token distributions: a student's against a teacher's.

Both bodies run over the batch once; both heads run over as many positions at a time as their logits may
stand in memory. The gradient of each chunk goes into the student's head at once and is collected where the
body ended, so that one backward pass through the body remains.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import final

import torch

from compress.numerics.buckets import Buckets
from compress.numerics.criterion import Criterion, Term
from compress.numerics.divergence import Imitation, imitation
from compress.training.head import Halves
from compress.training.objective import Losses, Objective
from compress.training.packing import JOINED, Packing
from compress.training.precision import Arithmetic, autocast

_COLUMNS: dict[Term, str] = {"forward_kl": "divergence"}
"""Names of terms in the history, where they differ: the divergence is there whatever is minimised."""

Distribution = torch.Tensor | Buckets
"""Logits ``[positions, vocabulary]``, or the most likely tokens with their probabilities."""


class Teacher(ABC):
    """Who knows what should be said at each position."""

    @abstractmethod
    def lesson(self, windows: torch.Tensor) -> Callable[[torch.Tensor], Distribution]:
        """What should be said after each token of windows but the last.

        Args:
            windows: int64 ``[batch, length]``, on the device. It is called inside the autocast of the passes.

        Returns:
            a function that gives the distributions of some positions, by their numbers among all
            ``batch * (length - 1)``.
        """


@final
class LiveTeacher(Teacher):
    """A model that is run over every batch.

    Args:
        model: in two halves, on the student's device.
    """

    def __init__(self, model: Halves) -> None:
        self._model = model

    @torch.no_grad()
    def lesson(self, windows: torch.Tensor) -> Callable[[torch.Tensor], Distribution]:
        """See `Teacher.lesson`."""
        states = self._model.states(windows)[:, :-1].flatten(0, 1)

        @torch.no_grad()
        def logits(rows: torch.Tensor) -> Distribution:
            return self._model.logits(states[rows])

        return logits


@final
class Distributions(Objective):
    """A weighted sum of divergences from the teacher and the cross-entropy on the text, nats a position.

    Args:
        student: a model in two halves.
        teacher: what it learns from.
        criterion: the terms.
        chunk: positions whose logits are computed at once.
        arithmetic: of the passes.
        packing: how documents share a window; nothing is predicted across their borders.
    """

    def __init__(
        self,
        student: Halves,
        teacher: Teacher,
        *,
        criterion: Criterion,
        chunk: int,
        arithmetic: Arithmetic,
        packing: Packing = JOINED,
    ) -> None:
        self._student = student
        self._teacher = teacher
        self._criterion = criterion
        self._chunk = chunk
        self._arithmetic = arithmetic
        self._packing = packing
        terms: list[Term] = ["forward_kl", "cross_entropy"]
        self._terms = [*terms, *(name for name in criterion.weights if name not in terms)]
        self.names = ("loss", *(_COLUMNS.get(name, name) for name in self._terms))

    def positions(self, windows: torch.Tensor, prompt: int = 1) -> int:
        """Tokens that are predicted: all but the first of each document.

        Args:
            prompt: as in `learn_after`.
        """
        return self._packing.count(windows, prompt)

    def learn(self, windows: torch.Tensor, positions: float) -> Losses:
        """See `Objective.learn`."""
        return self.learn_after(windows, 1, positions)

    def learn_after(self, windows: torch.Tensor, prompt: int, positions: float) -> Losses:
        """Learn what follows a prompt alone; otherwise as `learn`.

        Args:
            prompt: tokens at the start of each window that are given and not predicted, at least 1.
        """
        with autocast(self._arithmetic, windows.device):
            lesson = self._teacher.lesson(windows)
            body = self._student.states(windows)
            # Not part of the body's graph: what the chunks have to say to the body is collected here.
            flat, targets = body.detach()[:, :-1].flatten(0, 1), windows[:, 1:].flatten()
            wishes = torch.zeros_like(flat)
            losses = self._nothing(windows)
            for rows in self._packing.rows(windows, prompt).split(self._chunk):
                states = flat[rows].requires_grad_()
                logits = self._student.logits(states)
                found = imitation(
                    logits,
                    lesson(rows),
                    targets[rows],
                    self._criterion,
                    with_gradient=True,
                    scale=1 / positions,
                    consumed=True,
                )
                losses = losses.plus(self._sums(found))
                logits.backward(_there(found.gradient).to(logits.dtype))
                wishes[rows] = _there(states.grad)
        gradient = torch.zeros_like(body)
        gradient[:, :-1] = wishes.view(len(body), -1, body.shape[-1])
        body.backward(gradient)
        return losses

    @torch.no_grad()
    def judge(self, windows: torch.Tensor) -> Losses:
        """See `Objective.judge`; divergences are those of the plain distributions."""
        plain = replace(self._criterion, temperature=1.0)
        with autocast(self._arithmetic, windows.device):
            lesson = self._teacher.lesson(windows)
            flat = self._student.states(windows)[:, :-1].flatten(0, 1)
            targets = windows[:, 1:].flatten()
            losses = self._nothing(windows)
            for rows in self._packing.rows(windows).split(self._chunk):
                found = imitation(self._student.logits(flat[rows]), lesson(rows), targets[rows], plain)
                losses = losses.plus(self._sums(found))
        return losses

    def _sums(self, found: Imitation) -> Losses:
        values = [found.loss, *(found.terms[name] for name in self._terms)]
        sums = [value.sum(dtype=torch.float64) for value in values]
        return Losses(dict(zip(self.names, sums, strict=True)), len(found.loss))

    def _nothing(self, windows: torch.Tensor) -> Losses:
        zero = torch.zeros((), dtype=torch.float64, device=windows.device)
        return Losses(dict.fromkeys(self.names, zero), 0)


def _there(gradient: torch.Tensor | None) -> torch.Tensor:
    if gradient is None:
        raise RuntimeError("a gradient was asked for, and there is none")
    return gradient
