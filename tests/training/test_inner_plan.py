from typing import Any

import pytest

from compress.core.errors import PlanError
from compress.models.interior import Heads, Interior
from compress.training.inner_plan import Wish, comparison

STUDENT = Interior(2, 24, dict.fromkeys((1, 2), Heads(3, 3, 8, 8)))
TEACHER = Interior(4, 32, dict.fromkeys((1, 2, 3, 4), Heads(4, 2, 8, 8)))


def wish(**weights: Any) -> Wish:
    options = {
        name: weights.pop(name, default)
        for name, default in (("layer_map", ()), ("related", "last"), ("relation_heads", None))
    }
    everything = {"states": 0.0, "relations": 0.0, "maps": 0.0, "embeddings": 0.0, **weights}
    return Wish(everything, options["layer_map"], options["related"], options["relation_heads"], "mse")  # type: ignore[arg-type]


def test_relation_heads_divide_every_width() -> None:
    # Queries 24 and 32, keys and values 24 and 16.
    plan = comparison(wish(relations=1.0, states=2.0), STUDENT, TEACHER, causal=True)
    assert plan.relation_heads == 4
    assert plan.matrices == 12
    assert plan.related == ((2, 4),)
    assert plan.pairs == ((1, 2), (2, 4))
    assert plan.weights == {"relations": 1.0, "states": 2.0}
    assert plan.attention
    assert plan.causal
    assert plan.layers(0) == {1, 2}
    assert plan.layers(1) == {2, 4}
    assert plan.projected == (1, 2)
    assert (
        comparison(wish(relations=1.0, relation_heads=8), STUDENT, TEACHER, causal=True).relation_heads == 8
    )
    every = comparison(wish(relations=1.0, related="all"), STUDENT, TEACHER, causal=True)
    assert every.related == every.pairs
    with pytest.raises(PlanError, match="6 relation heads do not divide") as caught:
        comparison(wish(relations=1.0, relation_heads=6), STUDENT, TEACHER, causal=True)
    assert "1, 2, 4, 8" in caught.value.hint


def test_maps_need_as_many_heads() -> None:
    with pytest.raises(PlanError, match="3 heads, layer 2 of the teacher 4") as caught:
        comparison(wish(maps=1.0), STUDENT, TEACHER, causal=False)
    assert "--relations" in caught.value.hint


def test_attention_that_cannot_be_recorded_is_refused_where_it_is_needed() -> None:
    silent = Interior(2, 24, {1: Heads(3, 3, 8, 8)})
    with pytest.raises(PlanError, match="layer 2 of the student does its attention by itself"):
        comparison(wish(relations=1.0), silent, TEACHER, causal=False)
    assert comparison(wish(states=1.0), silent, TEACHER, causal=False).pairs == ((1, 2), (2, 4))


def test_embeddings_are_projected_too() -> None:
    plan = comparison(wish(embeddings=1.0), STUDENT, TEACHER, causal=False)
    assert plan.projected == (0,)
    assert not plan.attention
