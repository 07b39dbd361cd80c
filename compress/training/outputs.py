"""What a student says in the end, against what its teacher says: of the next token, of classes, of a text.

All three run both models once over a batch, and leave the gradient of the student's forward pass to be taken
together with that of whatever else is learned from the same pass (`compress.training.matching`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch.nn.functional import cross_entropy, kl_div

from compress.numerics.inner_states import Distance, apart
from compress.training.head import Halves
from compress.training.objective import Losses, Objective
from compress.training.packing import JOINED, Packing
from compress.training.precision import Arithmetic, autocast
from compress.training.reading import Documents

Watch = Callable[[], AbstractContextManager[None]]
"""A context in which a model's forward pass is recorded."""
Roots = list[tuple[torch.Tensor, torch.Tensor | None]]
"""Where the gradient of a forward pass begins: tensors with their gradients, ``None`` for a loss."""
Pooling = Literal["mean", "first"]


@dataclass(frozen=True)
class Side:
    """One of the two models, run over documents.

    Attributes:
        model: on its device.
        watch: the context of its forward passes.
    """

    model: Any
    watch: Watch = nullcontext

    def __call__(self, documents: Documents) -> Any:
        """What the model's forward returns."""
        with self.watch():
            return self.model(**documents.inputs)


class Outputs(ABC):
    """The loss of what comes out.

    Attributes:
        names: of its losses; the first is ``loss``.
    """

    names: tuple[str, ...]

    @abstractmethod
    def counts(self, windows: torch.Tensor) -> torch.Tensor:
        """What losses are a mean over, of each window, int64 ``[batch]``."""

    @abstractmethod
    def documents(self, windows: torch.Tensor) -> torch.Tensor:
        """The number of the document that a position belongs to, int64 ``[batch, length]``; 0 for padding."""

    @abstractmethod
    def learn(self, windows: torch.Tensor, positions: float) -> tuple[Losses, Roots]:
        """Run both models; the losses, and where the student's gradient begins.

        Args:
            windows: int64, on the device.
            positions: by how many the sum over the batch is divided.
        """

    @abstractmethod
    def judge(self, windows: torch.Tensor) -> Losses:
        """The losses, without a gradient."""

    @abstractmethod
    def run(self, windows: torch.Tensor) -> None:
        """Run both models, and nothing more."""


@final
class Watched(Halves):
    """A language model in two halves whose body is recorded, and whose graph ends at the body.

    Attributes:
        body: what the body gave last, with its graph.
        leaf: the same without; its gradient is what the head has to say to the body.
    """

    def __init__(self, halves: Halves, watch: Watch = nullcontext) -> None:
        self._halves = halves
        self._watch = watch
        self.body = self.leaf = torch.empty(0)

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Halves.states`."""
        with self._watch():
            self.body = self._halves.states(tokens)
        self.leaf = self.body.detach().requires_grad_(self.body.requires_grad)
        return self.leaf

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """See `Halves.logits`."""
        return self._halves.logits(states)


@final
class NextTokens(Outputs):
    """Next-token distributions, as another objective has them.

    Args:
        student, teacher: the halves that the objective was made of.
        objective: of windows of text.
        arithmetic: of the passes.
        packing: how documents share a window.
    """

    def __init__(
        self,
        student: Watched,
        teacher: Watched,
        objective: Objective,
        arithmetic: Arithmetic,
        packing: Packing = JOINED,
    ) -> None:
        self._student = student
        self._teacher = teacher
        self._objective = objective
        self._arithmetic = arithmetic
        self._packing = packing
        self.names = objective.names

    def counts(self, windows: torch.Tensor) -> torch.Tensor:
        """See `Outputs.counts`."""
        return self._packing.counts(windows)

    def documents(self, windows: torch.Tensor) -> torch.Tensor:
        """See `Outputs.documents`: windows have no padding."""
        return self._packing.numbers(windows)

    def learn(self, windows: torch.Tensor, positions: float) -> tuple[Losses, Roots]:
        """See `Outputs.learn`; the heads have learned when it returns."""
        losses = self._objective.learn(windows, positions)
        return losses, [(self._student.body, self._student.leaf.grad)]

    def judge(self, windows: torch.Tensor) -> Losses:
        """See `Outputs.judge`."""
        return self._objective.judge(windows)

    def run(self, windows: torch.Tensor) -> None:
        """See `Outputs.run`."""
        with autocast(self._arithmetic, windows.device):
            self._student.states(windows)
            with torch.no_grad():
                self._teacher.states(windows)


class _OfDocuments(Outputs):
    """The loss of one answer a document.

    Args:
        student, teacher: the models.
        padding: token of padding.
        arithmetic: of the passes.
    """

    def __init__(self, student: Side, teacher: Side, padding: int, arithmetic: Arithmetic) -> None:
        self._student = student
        self._teacher = teacher
        self._padding = padding
        self._arithmetic = arithmetic

    def counts(self, windows: torch.Tensor) -> torch.Tensor:
        """One: each window is a document."""
        return torch.ones(len(windows), dtype=torch.int64, device=windows.device)

    def documents(self, windows: torch.Tensor) -> torch.Tensor:
        """See `Outputs.documents`."""
        return Documents.of(windows, self._padding).counted.long()

    def learn(self, windows: torch.Tensor, positions: float) -> tuple[Losses, Roots]:
        """See `Outputs.learn`."""
        values = self._compared(windows)
        return self._losses(values), [(values["loss"].sum() / positions, None)]

    @torch.no_grad()
    def judge(self, windows: torch.Tensor) -> Losses:
        """See `Outputs.judge`."""
        return self._losses(self._compared(windows))

    def run(self, windows: torch.Tensor) -> None:
        """See `Outputs.run`."""
        self._said(windows)

    @abstractmethod
    def _values(self, documents: Documents, ours: Any, theirs: Any) -> dict[str, torch.Tensor]:
        """Every loss of every document, ``[batch]``, from what the forward passes returned."""

    def _said(self, windows: torch.Tensor) -> tuple[Documents, Any, Any]:
        documents = Documents.of(windows, self._padding)
        with autocast(self._arithmetic, windows.device):
            with torch.no_grad():
                theirs = self._teacher(documents)
            return documents, self._student(documents), theirs

    def _compared(self, windows: torch.Tensor) -> dict[str, torch.Tensor]:
        return self._values(*self._said(windows))

    def _losses(self, values: dict[str, torch.Tensor]) -> Losses:
        sums = {name: values[name].detach().sum(dtype=torch.float64) for name in self.names}
        return Losses(sums, len(values["loss"]))


@final
class Classes(_OfDocuments):
    """``(1 - share) T^2 KL(teacher_T || student_T) + share H(label, student)``, in nats a document.

    Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2. Where a document has no label, the class that
    its teacher chooses stands for it, also in the share of right answers.
    """

    names = ("loss", "divergence", "cross_entropy", "accuracy")

    def __init__(
        self,
        student: Side,
        teacher: Side,
        padding: int,
        arithmetic: Arithmetic,
        *,
        temperature: float,
        share: float,
    ) -> None:
        super().__init__(student, teacher, padding, arithmetic)
        self._temperature = temperature
        self._share = share

    def _values(self, documents: Documents, ours: Any, theirs: Any) -> dict[str, torch.Tensor]:
        said, wanted = _wide(ours.logits), _wide(theirs.logits)
        labels = torch.where(documents.labels >= 0, documents.labels, wanted.argmax(-1))
        soft, target = (logits.div(self._temperature).log_softmax(-1) for logits in (said, wanted))
        divergence = self._temperature**2 * kl_div(soft, target, reduction="none", log_target=True).sum(-1)
        entropy = cross_entropy(said, labels, reduction="none")
        return {
            "loss": (1.0 - self._share) * divergence + self._share * entropy,
            "divergence": divergence,
            "cross_entropy": entropy,
            "accuracy": (said.argmax(-1) == labels).double(),
        }


@final
class Vectors(_OfDocuments):
    """The distance of the two vectors of each text.

    Args:
        projection: of the student's vectors to the width of the teacher's.
        pooling: a text's vector is the ``mean`` of those of its tokens, or that of the ``first``.
        distance: of `compress.numerics.inner_states.apart`.
    """

    names = ("loss", "cosine")

    def __init__(
        self,
        student: Side,
        teacher: Side,
        padding: int,
        arithmetic: Arithmetic,
        *,
        projection: Callable[[torch.Tensor], torch.Tensor],
        pooling: Pooling,
        distance: Distance,
    ) -> None:
        super().__init__(student, teacher, padding, arithmetic)
        self._projection = projection
        self._pooling = pooling
        self._distance = distance

    def _values(self, documents: Documents, ours: Any, theirs: Any) -> dict[str, torch.Tensor]:
        pooled = (self._pooled(_wide(each.last_hidden_state), documents.counted) for each in (ours, theirs))
        vectors, wanted = pooled
        vectors = self._projection(vectors)
        whole = torch.ones_like(documents.counted[:, :1])
        loss = apart(vectors[:, None], wanted[:, None], whole, self._distance)
        return {"loss": loss, "cosine": torch.cosine_similarity(vectors, wanted, dim=-1)}

    def _pooled(self, states: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        if self._pooling == "first":
            return states[:, 0]
        weights = counted[..., None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()
