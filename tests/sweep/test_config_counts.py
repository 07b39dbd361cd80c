"""Numbers in configurations are found by what depends on them."""

from pathlib import Path

import pytest

from compress.core.artifact import Artifact
from compress.core.run import Run
from compress.sweep.config_counts import Count, find_count, resized
from compress.sweep.config_search import ConfigSearch
from tests import models_zoo


def search_of(name: str, folder: Path) -> ConfigSearch:
    return ConfigSearch(Artifact.open(models_zoo.write(name, folder)), Run())


@pytest.mark.parametrize(
    ("name", "field"),
    [("mixtral", "num_local_experts"), ("qwen2-moe", "num_experts"), ("gpt-oss", "num_local_experts")],
)
def test_the_number_of_experts_is_told_from_that_of_heads(name: str, field: str, tmp_path: Path) -> None:
    # All of these have four heads as well.
    search = search_of(name, tmp_path)
    document = dict(search.source.config)
    experts = "model.layers.0.mlp.experts.down_proj"
    found = find_count(search, document, 4, 3, [experts])
    assert found is not None
    assert found.fields == (field,)
    assert found.dimensions[experts] == 0
    assert not any("attn" in parameter for parameter in found.dimensions)
    before = search.shapes(document)
    assert before is not None
    assert search.shapes(found.document(document, 2)) == resized(before, found, 2)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert", "opt", "gemma3"])
def test_the_number_of_tokens_is_found_with_everything_that_has_a_row_for_each(
    name: str, tmp_path: Path
) -> None:
    search = search_of(name, tmp_path)
    document = dict(search.source.config)
    before = search.shapes(document)
    assert before is not None
    rows = [parameter for parameter in before if "embed" in parameter or "wte" in parameter]
    embedding = next(parameter for parameter in rows if before[parameter][0] == models_zoo.VOCABULARY)
    found = find_count(search, document, models_zoo.VOCABULARY, models_zoo.VOCABULARY + 1, [embedding])
    assert found is not None
    assert found.fields == ("vocab_size",)
    # GPT-2's queries, keys and values are together as wide as its vocabulary is long.
    assert set(found.dimensions) == {embedding, *(name for name in before if name == "lm_head.weight")}


def test_nothing_is_found_where_nothing_depends_on_the_number(tmp_path: Path) -> None:
    search = search_of("llama", tmp_path)
    document = dict(search.source.config)
    assert find_count(search, document, 7, 6, ["model.embed_tokens.weight"]) is None
    # The number of heads changes widths, and not from one number to the other.
    assert find_count(search, document, 4, 3, ["model.layers.0.self_attn.q_proj.weight"]) is None


def test_a_number_is_written_in_the_spelling_that_the_file_has() -> None:
    count = Count(("num_local_experts",), {"num_experts": "num_local_experts"}, {})
    assert count.document({"num_experts": 4}, 3) == {"num_experts": 3}
    assert count.document({"num_local_experts": 4, "other": 4}, 3) == {"num_local_experts": 3, "other": 4}
    assert count.document({}, 3) == {"num_local_experts": 3}
    both = {"num_local_experts": 4, "num_experts": 4}
    assert count.document(both, 3) == dict.fromkeys(both, 3)
