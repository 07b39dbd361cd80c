"""From shares to numbers that a class accepts, and the fields that hold them."""

from pathlib import Path
from typing import Any

import pytest

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.run import Run
from compress.models.load import skeleton
from compress.sweep.config_search import ConfigSearch
from compress.sweep.narrow_cuts import complement, ranges
from compress.sweep.narrow_plan import (
    Asked,
    kernel_multiple,
    nearest_heads,
    nearest_multiples,
    plan_narrowing,
)
from compress.sweep.zeros import Pattern
from tests import models_zoo


@pytest.mark.parametrize(
    ("width", "wanted", "expected"),
    [
        (11008, 8256, 128),  # 64.5 runs of 128: 64 more or less are half a percent of the width
        (14336, 10752, 128),
        (768, 576, 64),  # 128 would move it by 64 of 768
        (64, 48, 16),
        (64, 45, 1),  # eight would move it by three of 64
        (100, 75, 1),
    ],
)
def test_the_multiple_that_kernels_like_moves_the_number_little(
    width: int, wanted: int, expected: int
) -> None:
    assert kernel_multiple(width, wanted) == expected


def test_multiples_come_nearest_first_and_stay_below_the_width() -> None:
    assert list(nearest_multiples(45, 16, 64)) == [48, 32, 16]
    assert list(nearest_multiples(40, 16, 64)) == [48, 32, 16]
    assert list(nearest_multiples(45, 100, 64)) == []


def test_heads_come_nearest_first_whole_groups_before_parts_of_each() -> None:
    assert list(nearest_heads(2, 2, 2)) == [(1, 2), (2, 1), (1, 1), (2, 2)]
    assert next(nearest_heads(6, 2, 4)) == (2, 3)
    assert next(nearest_heads(24, 8, 4)) == (6, 4)
    # Of two as near the larger.
    assert next(nearest_heads(3, 2, 2)) == (2, 2)


def test_places_and_ranges() -> None:
    assert complement([1, 3], 5).tolist() == [0, 2, 4]
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2 5 7-8"
    assert ranges([]) == ""


def test_a_pattern_is_two_numbers() -> None:
    assert Pattern.parse("4:8") == Pattern(4, 8)
    assert str(Pattern(2, 4)) == "2:4"
    for text in ("4:4", "0:4", "2-4", ":4", "a:b", "-1:4"):
        with pytest.raises(ValueError, match="N:M"):
            Pattern.parse(text)


FIELDS = {
    "llama": "intermediate_size",
    "gpt2": "n_inner",
    "opt": "ffn_dim",
    "gpt-neox": "intermediate_size",
    "bert": "intermediate_size",
}


@pytest.mark.parametrize("name", FIELDS)
def test_the_field_of_the_width_is_found_by_trying(name: str, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write(name, tmp_path))
    plan = plan_narrowing(Asked(0.5, 1.0), source, Run())
    changed = {key: value for key, value in plan.config.items() if source.config.get(key) != value}
    assert changed == {FIELDS[name]: plan.verdicts["channels"].got}


def test_a_width_of_head_that_was_never_said_is_said(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("phi", tmp_path))
    assert "head_dim" not in source.config
    plan = plan_narrowing(Asked(1.0, 0.75), source, Run())
    assert plan.config["head_dim"] == 8
    assert plan.config["num_attention_heads"] == plan.config["num_key_value_heads"] == 3


def test_an_alias_gives_way_to_the_name_of_the_field(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("gpt2", tmp_path))
    search = ConfigSearch(source, Run())
    document: dict[str, Any] = {**source.config, "hidden_size": 32}
    del document["n_embd"]
    assert search.edited(document, {"n_embd": 16})["n_embd"] == 16
    assert "hidden_size" not in search.edited(document, {"n_embd": 16})


def test_a_refusal_says_what_the_class_said(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    search = ConfigSearch(source, Run())
    assert search.shapes({**source.config, "num_attention_heads": 3}) is None
    assert "hidden size" in search.refusal
    model = skeleton(source)
    assert search.shapes(source.config) == {n: tuple(p.shape) for n, p in model.named_parameters()}


def test_widths_that_no_field_holds_are_refused(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("gpt2", tmp_path))
    with pytest.raises(PlanError, match="2 of 4 query heads cannot be kept"):
        plan_narrowing(Asked(0.5, 0.5, insists=frozenset({"heads"})), source, Run())
