"""What of two models can be compared inside, decided from their configurations when a chain is planned."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from compress.core.errors import PlanError
from compress.models.interior import Heads, Interior
from compress.numerics.inner_states import Distance
from compress.training.layer_map import layer_pairs
from compress.training.matching import Pairs, Plan, Term


@dataclass(frozen=True)
class Wish:
    """What was asked for.

    Attributes:
        weights: of the terms; 0 leaves one out.
        layer_map: as `layer_pairs` takes it.
        related: whether relations are compared in the last pair of layers alone.
        relation_heads: or ``None`` for a number that fits.
        distance: of hidden states.
    """

    weights: Mapping[Term, float]
    layer_map: Sequence[int]
    related: Literal["last", "all"]
    relation_heads: int | None
    distance: Distance

    @property
    def wanted(self) -> dict[Term, float]:
        """The terms that have a weight."""
        return {term: weight for term, weight in self.weights.items() if weight}


def comparison(wish: Wish, student: Interior, teacher: Interior, *, causal: bool) -> Plan:
    """What will be compared.

    Raises:
        PlanError: layers that are not there, attention that cannot be recorded or has other heads.
    """
    pairs = layer_pairs(student.layers, teacher.layers, wish.layer_map)
    related = pairs[-1:] if wish.related == "last" else pairs
    heads, map_heads = 0, 0
    if "maps" in wish.wanted:
        for one, other in pairs:
            ours, theirs = _heads(student, one, "the student"), _heads(teacher, other, "the teacher")
            if ours.heads != theirs.heads:
                raise PlanError(
                    f"attention maps are compared head by head, and layer {one} of the student has "
                    f"{ours.heads} heads, layer {other} of the teacher {theirs.heads}",
                    "use --relations in place of --maps: they do not need as many heads",
                )
            map_heads = ours.heads
    if "relations" in wish.wanted:
        heads = _relation_heads(wish.relation_heads, related, student, teacher)
    return Plan(wish.wanted, pairs, related, heads, map_heads, wish.distance, causal)


def _relation_heads(asked: int | None, pairs: Pairs, student: Interior, teacher: Interior) -> int:
    """A number that divides all widths: what was asked, or as many as the teacher has heads, at most."""
    found = [
        heads
        for one, other in pairs
        for heads in (_heads(student, one, "the student"), _heads(teacher, other, "the teacher"))
    ]
    widths = sorted({width for heads in found for width in heads.widths})
    common = math.gcd(*widths)
    fitting = [number for number in range(1, common + 1) if common % number == 0]
    if asked is None:
        return max(number for number in fitting if number <= found[-1].heads)
    if asked not in fitting:
        raise PlanError(
            f"{asked} relation heads do not divide queries, keys and values of the widths "
            f"{', '.join(map(str, widths))}",
            f"set --relation-heads to one of {', '.join(map(str, fitting))}",
        )
    return asked


def _heads(interior: Interior, layer: int, whose: str) -> Heads:
    found = interior.heads.get(layer)
    if found is None:
        raise PlanError(
            f"layer {layer} of {whose} does its attention by itself, and not by transformers' attention "
            "functions: its queries, keys and values cannot be recorded",
            "leave --relations and --maps at 0: hidden states can be compared all the same",
        )
    return found
