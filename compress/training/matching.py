"""The objective of `distill.hidden` and `distill.classes`: what models say, and compute on their way.

One forward pass of each model serves all losses. Layers of the student are compared with the layers of the
teacher that they are paired with; where widths differ, a projection that is trained beside the student brings
its states to the teacher's width, and is thrown away in the end (Jiao et al. 2020, arXiv 1909.10351).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, final

import torch
from torch import nn

from compress.models.interior import Attended, Record, Recorder
from compress.numerics.inner_states import (
    Distance,
    apart,
    relation_divergence,
    score_distance,
    scores,
    visible,
)
from compress.training.objective import Losses, Objective
from compress.training.outputs import Outputs, Roots

Term = Literal["states", "relations", "maps", "embeddings"]
Pairs = Sequence[tuple[int, int]]

OUTPUTS: Final = "outputs"
"""The name of the loss of what comes out, beside those of `Term`."""
EMBEDDED: Final = 0
VECTOR: Final = -1
"""What stands for what goes into the first layer, and for a text's vector, among the numbers of layers."""


@dataclass(frozen=True)
class Plan:
    """What is compared inside.

    Attributes:
        weights: of the terms, each above 0.
        pairs: layers of student and teacher whose hidden states and attention scores are compared.
        related: layers whose relations are compared.
        relation_heads: how many relation heads.
        map_heads: how many heads each layer has whose scores are compared.
        distance: of hidden states.
        causal: whether a position sees none that come after it.
    """

    weights: Mapping[Term, float]
    pairs: Pairs
    related: Pairs
    relation_heads: int
    map_heads: int
    distance: Distance
    causal: bool

    @property
    def attention(self) -> bool:
        """Whether queries, keys and values are needed."""
        return "relations" in self.weights or "maps" in self.weights

    @property
    def matrices(self) -> int:
        """Matrices ``[length, length]`` of one sequence and one model that are compared."""
        related = 3 * len(self.related) * self.relation_heads if "relations" in self.weights else 0
        return related + (len(self.pairs) * self.map_heads if "maps" in self.weights else 0)

    def layers(self, side: Literal[0, 1]) -> frozenset[int]:
        """The layers of the student (0) or of the teacher (1) that are needed."""
        return frozenset(pair[side] for pair in (*self.pairs, *self.related))

    @property
    def projected(self) -> tuple[int, ...]:
        """What is projected where widths differ: numbers of the student's layers, and `EMBEDDED`."""
        layers = tuple(layer for layer, _ in self.pairs) if "states" in self.weights else ()
        return ((EMBEDDED,) if "embeddings" in self.weights else ()) + layers


@final
class Projections(nn.ModuleDict):
    """One matrix for each place that is projected, ``[teacher's width, student's width]``, without bias.

    They begin orthogonal, the identity where the widths are the same.

    Args:
        places: numbers of the student's layers, `EMBEDDED` and `VECTOR`.
        widths: of student and teacher.
        seed: of the first values.
    """

    def __init__(self, places: Sequence[int], widths: tuple[int, int], seed: int) -> None:
        super().__init__({str(place): _projection(widths, seed + place + 1) for place in places})

    def at(self, place: int, states: torch.Tensor) -> torch.Tensor:
        """States in the teacher's width, in float32; as they are where nothing is projected."""
        if str(place) not in self:
            return states
        weight = self.get_parameter(f"{place}.weight")
        return nn.functional.linear(states.to(weight.dtype), weight)


def _projection(widths: tuple[int, int], seed: int) -> nn.Linear:
    layer = nn.Linear(*widths, bias=False)
    with torch.no_grad():
        if widths[0] == widths[1]:
            layer.weight.copy_(torch.eye(widths[0]))
        else:
            nn.init.orthogonal_(layer.weight, generator=torch.Generator().manual_seed(seed))
    return layer


@final
@dataclass(frozen=True)
class Inside:
    """The losses of what both models compute on their way.

    Attributes:
        student, teacher: what takes note of them.
        plan: what is compared.
        projections: of hidden states.
    """

    student: Recorder
    teacher: Recorder
    plan: Plan
    projections: Projections = field(default_factory=lambda: Projections((), (1, 1), 0))

    def values(self, documents: torch.Tensor) -> dict[Term, torch.Tensor]:
        """The terms of the last forward passes, ``[batch]`` each, unweighted: a mean over layers.

        Args:
            documents: int64 ``[batch, length]``, the number of the document that a position belongs to, 0
                where there is padding.
        """
        plan, ours, theirs = self.plan, self.student.record, self.teacher.record
        counted = documents > 0
        found: dict[Term, torch.Tensor] = {}
        if "states" in plan.weights:
            found["states"] = _mean(
                apart(
                    self.projections.at(one, ours.hidden[one]), theirs.hidden[other], counted, plan.distance
                )
                for one, other in plan.pairs
            )
        if "embeddings" in plan.weights:
            embedded = self.projections.at(EMBEDDED, _embedded(ours))
            found["embeddings"] = apart(embedded, _embedded(theirs), counted, plan.distance)
        seen = visible(documents, causal=plan.causal) if plan.attention else counted
        if "maps" in plan.weights:
            found["maps"] = _mean(
                score_distance(_scores(ours.attended[one]), _scores(theirs.attended[other]), counted, seen)
                for one, other in plan.pairs
            )
        if "relations" in plan.weights:
            found["relations"] = _mean(
                relation_divergence(mine, wanted, plan.relation_heads, counted, seen)
                for one, other in plan.related
                for mine, wanted in zip(
                    _side_by_side(ours.attended[one]), _side_by_side(theirs.attended[other]), strict=True
                )
            )
        return found


@final
class Matching(Objective):
    """A weighted sum of the loss of what comes out and of those of what is inside.

    Args:
        outputs: of what comes out; it runs the models.
        weight: of its loss; 0 leaves it out.
        inside: of what is inside, if anything.
    """

    def __init__(self, outputs: Outputs, weight: float = 1.0, inside: Inside | None = None) -> None:
        self._outputs = outputs
        self._weight = weight
        self._inside = inside
        self._weights = dict(inside.plan.weights) if inside is not None else {}
        said = (OUTPUTS, *outputs.names[1:]) if weight else ()
        # Where nothing is compared inside, the loss of what comes out is all there is.
        self.names = ("loss", *self._weights, *(said if self._weights else said[1:]))

    def positions(self, windows: torch.Tensor) -> int:
        """See `Objective.positions`."""
        return int(self._outputs.counts(windows).sum())

    def learn(self, windows: torch.Tensor, positions: float) -> Losses:
        """See `Objective.learn`."""
        losses: Losses | None = None
        roots: Roots = []
        if self._weight:
            losses, roots = self._outputs.learn(windows, positions / self._weight)
        else:
            self._outputs.run(windows)
        values = self._values(windows)
        if values:
            shares = self._outputs.counts(windows).double() / positions
            terms = [self._weights[name] * (value * shares).sum() for name, value in values.items()]
            roots.append((torch.stack(terms).sum(), None))
        tensors, gradients = zip(*roots, strict=True)
        torch.autograd.backward(tensors, gradients)
        return self._sums(windows, losses, values)

    @torch.no_grad()
    def judge(self, windows: torch.Tensor) -> Losses:
        """See `Objective.judge`."""
        losses = None
        if self._weight:
            losses = self._outputs.judge(windows)
        else:
            self._outputs.run(windows)
        return self._sums(windows, losses, self._values(windows))

    def _values(self, windows: torch.Tensor) -> dict[Term, torch.Tensor]:
        return {} if self._inside is None else self._inside.values(self._outputs.documents(windows))

    def _sums(
        self, windows: torch.Tensor, said: Losses | None, values: Mapping[Term, torch.Tensor]
    ) -> Losses:
        """The mean inside a window counts for as many positions as its outputs do."""
        counts = self._outputs.counts(windows)
        sums: dict[str, torch.Tensor] = {}
        loss = torch.zeros((), dtype=torch.float64, device=windows.device)
        for name, value in values.items():
            sums[name] = (value.detach() * counts).sum(dtype=torch.float64)
            loss = loss + self._weights[name] * sums[name]
        if said is not None:
            loss = loss + self._weight * said.sums["loss"]
            sums |= {
                OUTPUTS: said.sums["loss"],
                **{name: said.sums[name] for name in self._outputs.names[1:]},
            }
        sums["loss"] = loss
        return Losses({name: sums[name] for name in self.names}, int(counts.sum()))


def _embedded(record: Record) -> torch.Tensor:
    if record.embedded is None:
        raise RuntimeError("no block of the model ran, and they did when the chain was planned")
    return record.embedded


def _scores(found: Attended) -> torch.Tensor:
    return scores(found.queries, found.keys, found.scale)


def _side_by_side(found: Attended) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of all heads side by side, ``[batch, length, width]``."""
    parts = (found.queries, found.keys, found.values)
    queries, keys, values = (part.transpose(1, 2).flatten(2) for part in parts)
    return queries, keys, values


def _mean(terms: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(terms)).mean(0)
