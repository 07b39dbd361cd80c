"""The objective of `distill.logits`: a student's next-token distributions against a teacher's.

Both bodies run over the batch once; both heads run over as many positions at a time as their logits may
stand in memory. The gradient of each chunk goes into the student's head at once and is collected where the
body ended, so that one backward pass through the body remains.
"""

from typing import final

import torch

from compress.numerics.divergence import Imitation, imitation
from compress.training.head import Halves
from compress.training.objective import Losses, Objective
from compress.training.precision import Arithmetic, autocast


@final
class Distributions(Objective):
    """``(1 - share) T^2 KL(teacher_T || student_T) + share H(text, student)``, in nats a position.

    Args:
        student, teacher: models in two halves, on one device.
        temperature: of both distributions.
        share: of the cross-entropy on the text.
        chunk: positions whose logits are computed at once.
        arithmetic: of the passes.
    """

    names = ("loss", "divergence", "cross_entropy")

    def __init__(
        self,
        student: Halves,
        teacher: Halves,
        *,
        temperature: float,
        share: float,
        chunk: int,
        arithmetic: Arithmetic,
    ) -> None:
        self._student = student
        self._teacher = teacher
        self._temperature = temperature
        self._share = share
        self._chunk = chunk
        self._arithmetic = arithmetic

    def positions(self, windows: torch.Tensor) -> int:
        """Tokens that are predicted: all but the first of each window."""
        return windows.shape[0] * (windows.shape[1] - 1)

    def learn(self, windows: torch.Tensor, positions: float) -> Losses:
        """See `Objective.learn`."""
        with autocast(self._arithmetic, windows.device):
            wanted = self._of_teacher(windows)
            body = self._student.states(windows)
            # Not part of the body's graph: what the chunks have to say to the body is collected here.
            flat, targets = body.detach()[:, :-1].flatten(0, 1), windows[:, 1:].flatten()
            wishes = torch.zeros_like(flat)
            losses = self._nothing(windows)
            for rows in self._chunks(len(targets)):
                states = flat[rows].clone().requires_grad_()
                logits = self._student.logits(states)
                found = imitation(
                    logits,
                    self._logits_of_teacher(wanted[rows]),
                    targets[rows],
                    temperature=self._temperature,
                    share=self._share,
                    with_gradient=True,
                )
                losses = losses.plus(self._sums(found))
                logits.backward(_there(found.gradient).div_(positions).to(logits.dtype))
                wishes[rows] = _there(states.grad)
        gradient = torch.zeros_like(body)
        gradient[:, :-1] = wishes.view(len(body), -1, body.shape[-1])
        body.backward(gradient)
        return losses

    @torch.no_grad()
    def judge(self, windows: torch.Tensor) -> Losses:
        """See `Objective.judge`; the divergence is that of the plain distributions."""
        with autocast(self._arithmetic, windows.device):
            wanted = self._of_teacher(windows)
            flat = self._student.states(windows)[:, :-1].flatten(0, 1)
            targets = windows[:, 1:].flatten()
            losses = self._nothing(windows)
            for rows in self._chunks(len(targets)):
                logits = self._student.logits(flat[rows])
                found = imitation(logits, self._logits_of_teacher(wanted[rows]), targets[rows])
                losses = losses.plus(self._sums(found))
        return losses

    @torch.no_grad()
    def _of_teacher(self, windows: torch.Tensor) -> torch.Tensor:
        return self._teacher.states(windows)[:, :-1].flatten(0, 1)

    @torch.no_grad()
    def _logits_of_teacher(self, states: torch.Tensor) -> torch.Tensor:
        return self._teacher.logits(states)

    def _chunks(self, count: int) -> list[slice]:
        return [slice(at, min(at + self._chunk, count)) for at in range(0, count, self._chunk)]

    def _sums(self, found: Imitation) -> Losses:
        divergence = found.divergence.sum(dtype=torch.float64)
        cross_entropy = found.cross_entropy.sum(dtype=torch.float64)
        loss = (1.0 - self._share) * divergence + self._share * cross_entropy
        sums = {"loss": loss, "divergence": divergence, "cross_entropy": cross_entropy}
        return Losses(sums, len(found.divergence))

    def _nothing(self, windows: torch.Tensor) -> Losses:
        zero = torch.zeros((), dtype=torch.float64, device=windows.device)
        return Losses(dict.fromkeys(self.names, zero), 0)


def _there(gradient: torch.Tensor | None) -> torch.Tensor:
    if gradient is None:
        raise RuntimeError("a gradient was asked for, and there is none")
    return gradient
