"""The objective across two vocabularies: outcomes that both know, where both have read the same text."""

from collections.abc import Callable
from dataclasses import replace
from typing import Final, final

import torch

from compress.core.errors import CalibrationError
from compress.numerics.criterion import Criterion, Term
from compress.numerics.divergence import imitation
from compress.numerics.outcomes import aligned, ordered
from compress.training.distiller import Comparison
from compress.training.head import Halves
from compress.training.imitation import Distribution, LiveTeacher, Teacher
from compress.training.objective import Losses, Objective
from compress.training.precision import Arithmetic, autocast
from compress.training.vocabularies import Reading, Translation

_FEWEST: Final = 0.05
"""Share of the positions at which both must have read the same for it to be a training."""


@final
class ForeignTeacher(Teacher):
    """A model with another tokenizer.

    Args:
        model: in two halves, on the student's device.
        words: both tokenizers.
    """

    def __init__(self, model: Halves, words: Translation) -> None:
        self.words = words
        self._model = LiveTeacher(model)

    def lesson(self, windows: torch.Tensor) -> Callable[[torch.Tensor], Distribution]:
        """See `Teacher.lesson`; windows are of its own tokens."""
        return self._model.lesson(windows)


@final
class Across(Objective):
    """A weighted sum of divergences over common outcomes and the cross-entropy on the text.

    Args:
        student: a model in two halves.
        teacher: a model with other tokens.
        comparison: ``aligned`` or ``uld``; what outcomes are (`compress.numerics.outcomes`).
        criterion: the terms.
        chunk: positions whose logits are computed at once.
        arithmetic: of the passes.
    """

    def __init__(
        self,
        student: Halves,
        teacher: ForeignTeacher,
        *,
        comparison: Comparison,
        criterion: Criterion,
        chunk: int,
        arithmetic: Arithmetic,
    ) -> None:
        self._student = student
        self._teacher = teacher
        self._words = teacher.words
        self._sorted = comparison == "uld"
        self._criterion = criterion
        self._chunk = chunk
        self._arithmetic = arithmetic
        self._terms: list[Term] = [name for name in criterion.weights if name != "cross_entropy"]
        self.names = ("loss", *self._terms, "cross_entropy")

    def positions(self, windows: torch.Tensor) -> int:
        """Tokens that are predicted: all but the first of each window, also those that are not compared."""
        return windows.shape[0] * (windows.shape[1] - 1)

    def learn(self, windows: torch.Tensor, positions: float) -> Losses:
        """See `Objective.learn`."""
        return self._compared(windows, self._criterion, positions)

    @torch.no_grad()
    def judge(self, windows: torch.Tensor) -> Losses:
        """See `Objective.judge`; divergences are those of the plain distributions."""
        return self._compared(windows, replace(self._criterion, temperature=1.0), None)

    def _compared(self, windows: torch.Tensor, criterion: Criterion, positions: float | None) -> Losses:
        """The losses of a batch; with their gradient where a number of positions divides it."""
        readings = [self._words.read(tuple(window)) for window in windows.tolist()]
        count = sum(len(reading.ours) for reading in readings)
        if count < _FEWEST * self.positions(windows):
            raise CalibrationError(
                f"student and teacher have read the same text at {count} of {self.positions(windows)} places",
                "do both tokenizers know this text? give another --teacher or --train",
            )
        zero = torch.zeros((), dtype=torch.float64, device=windows.device)
        losses = Losses(dict.fromkeys(self.names, zero), 0)
        with autocast(self._arithmetic, windows.device):
            body = self._student.states(windows)
            flat = body.detach()
            wishes = torch.zeros_like(flat)
            for row, reading in enumerate(readings):
                if not reading.ours:
                    continue
                theirs = self._lesson(reading, windows.device)
                ours = torch.tensor(reading.ours, device=windows.device)
                for at in range(0, len(ours), self._chunk):
                    places = ours[at : at + self._chunk]
                    states = flat[row, places].requires_grad_(positions is not None)
                    targets = windows[row, places + 1]
                    wanted = theirs(slice(at, at + self._chunk))
                    found, total = self._loss(states, wanted, targets, criterion)
                    losses = losses.plus(found)
                    if positions is not None and states.requires_grad:
                        (total / positions).backward()
                        if states.grad is not None:
                            wishes[row, places] = states.grad
        if positions is not None:
            body.backward(wishes)
        return losses

    def _lesson(self, reading: Reading, device: torch.device) -> Callable[[slice], torch.Tensor]:
        """What the teacher says at some of the positions of a window, ``[positions, vocabulary]``."""
        said = self._teacher.lesson(torch.tensor([reading.tokens], device=device))
        places = torch.tensor(reading.theirs, device=device)

        def logits(rows: slice) -> torch.Tensor:
            found = said(places[rows])
            if not isinstance(found, torch.Tensor):
                raise TypeError(f"a teacher of other tokens says logits, got {type(found).__name__}")
            return found

        return logits

    def _loss(
        self,
        states: torch.Tensor,
        wanted: torch.Tensor,
        targets: torch.Tensor,
        criterion: Criterion,
    ) -> tuple[Losses, torch.Tensor]:
        """Sums over some positions, and the scalar whose gradient is that of their weighted sum."""
        logits = self._student.logits(states)
        truth = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        heat = criterion.temperature
        ours = self._outcomes(logits / heat, wanted.shape[-1], 0)
        theirs = self._outcomes(wanted / heat, logits.shape[-1], 1)
        weights = {
            name: criterion.weights[name] * heat ** (1 if name == "total_variation" else 2)
            for name in self._terms
        }
        nothing = torch.zeros_like(targets)
        learns = states.requires_grad and bool(weights)
        found = imitation(ours, theirs, nothing, Criterion(weights, criterion.beta), with_gradient=learns)
        share = criterion.weights.get("cross_entropy", 0.0)
        total = share * truth
        if found.gradient is not None:
            total = total + (ours * found.gradient).sum()
        sums: dict[str, torch.Tensor] = {"cross_entropy": truth.detach().double()}
        loss = share * sums["cross_entropy"]
        for name in self._terms:
            sums[name] = found.terms[name].sum(dtype=torch.float64)
            loss = loss + weights[name] * sums[name]
        return Losses({"loss": loss, **sums}, len(targets)), total

    def _outcomes(self, logits: torch.Tensor, other: int, side: int) -> torch.Tensor:
        if self._sorted:
            return ordered(logits, max(logits.shape[-1], other))
        return aligned(logits, self._words.pairs[:, side].to(logits.device))
