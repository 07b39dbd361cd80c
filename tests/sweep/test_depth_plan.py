"""Which blocks a configuration can do without, and what becomes of its fields and of names on disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.run import Run
from compress.models.checkpoint import Checkpoint
from compress.models.load import skeleton
from compress.sweep.depth_choice import best_windows, dispensable, ranked, windows
from compress.sweep.depth_names import disk_names
from compress.sweep.depth_plan import DepthPlan, one_by_one, plan_depth
from compress.sweep.depth_stacks import Size
from tests import models_zoo


def plan_of(name: str, folder: Path, size: Size | None = None) -> DepthPlan:
    return plan_depth(size or Size(0.7), Artifact.open(models_zoo.write(name, folder)), Run())


def five_layers(folder: Path, **options: Any) -> Path:
    config = models_zoo.configuration("llama")
    config.num_hidden_layers = 5
    for key, value in options.items():
        setattr(config, key, value)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "five")
    return folder / "five"


@pytest.mark.parametrize(
    ("name", "field"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer"), ("bert", "num_hidden_layers")]
)
def test_the_number_of_blocks_is_found_under_its_own_name(name: str, field: str, tmp_path: Path) -> None:
    plan = plan_of(name, tmp_path)
    config = plan.config((0, 2))
    assert config is not None
    before = plan.source.config
    assert config[field] == 2
    assert {key for key, value in config.items() if before.get(key) != value} == {field}


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ((0, 1), ["sliding_attention", "full_attention"]),
        ((0, 2), ["sliding_attention", "sliding_attention"]),
        ((1,), ["full_attention"]),
    ],
)
@pytest.mark.parametrize("name", ["qwen2-sliding", "gemma3", "gpt-oss"])
def test_lists_lose_the_entries_of_blocks_that_go(
    name: str, kept: tuple[int, ...], expected: list[str], tmp_path: Path
) -> None:
    config = plan_of(name, tmp_path).config(kept)
    assert config is not None
    assert config["layer_types"] == expected
    assert config["num_hidden_layers"] == len(kept)


def test_lists_that_the_class_fills_in_are_written_out(tmp_path: Path) -> None:
    folder = models_zoo.write("gemma2", tmp_path)
    file = folder / "config.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    del document["layer_types"]
    file.write_text(json.dumps(document), encoding="utf-8")
    config = plan_depth(Size(0.7), Artifact.open(folder), Run()).config((0, 2))
    assert config is not None
    assert config["layer_types"] == ["sliding_attention", "sliding_attention"]


def test_tokens_are_no_list_over_blocks(tmp_path: Path) -> None:
    source = Artifact.open(five_layers(tmp_path, eos_token_id=[2, 3, 4, 5, 6]))
    config = plan_depth(Size(0.6), source, Run()).config((0, 1, 4))
    assert config is not None
    assert config["eos_token_id"] == [2, 3, 4, 5, 6]


def test_a_first_block_of_another_build_stays_the_first(tmp_path: Path) -> None:
    plan = plan_of("modernbert", tmp_path)
    assert not plan.fits((0,))
    assert plan.fits((1,))
    assert plan.fits((2,))
    assert dispensable({0: 0.1, 1: 0.3, 2: 0.2}, plan) == (2,)
    assert best_windows({0: 0.1, 1: 0.3, 2: 0.2}, plan) == (2,)
    assert plan.held() == {"layers.0": "it has no attn_norm.weight"}


def test_experts_in_some_blocks_only_are_renumbered(tmp_path: Path) -> None:
    config = models_zoo.configuration("qwen2-moe")
    config.mlp_only_layers = [1]
    transformers.Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "mixed")
    plan = plan_depth(Size(0.7), Artifact.open(tmp_path / "mixed"), Run())
    without_first, without_plain = plan.config((1, 2)), plan.config((0, 2))
    assert without_first is not None
    assert without_first["mlp_only_layers"] == [0]
    assert without_plain is not None
    assert without_plain["mlp_only_layers"] == []


def test_shapes_are_those_of_the_blocks_that_stay(tmp_path: Path) -> None:
    plan = plan_of("llama", tmp_path)
    shapes = plan.shapes_of((0, 2))
    assert {name for name in shapes if ".layers." in name} == {
        name for name in plan.shapes if ".layers.0." in name or ".layers.1." in name
    }
    assert plan.renamed("model.layers.2.mlp.up_proj.weight", (0, 2)) == "model.layers.1.mlp.up_proj.weight"
    assert plan.renamed("model.layers.1.mlp.up_proj.weight", (0, 2)) is None
    assert plan.renamed("model.norm.weight", (0, 2)) == "model.norm.weight"
    assert plan.count(shapes) < plan.count(plan.shapes)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral", "opt"])
def test_names_on_disk_count_blocks_in_one_place(name: str, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write(name, tmp_path))
    model = skeleton(source)
    checkpoint = Checkpoint(source, model)
    plan = plan_depth(Size(0.7), source, Run())
    names = disk_names(checkpoint, plan.blocks)
    for block in (1, 2):
        for name_ in checkpoint.names_of(plan.blocks[block]):
            renamed = names.renumbered(name_, 0)
            assert checkpoint.target[renamed] == plan.renamed(checkpoint.target[name_], (block,))


def test_blocks_go_in_the_order_of_what_they_do_and_later_ones_first(tmp_path: Path) -> None:
    assert ranked({0: 0.2, 1: 0.1, 2: 0.2, 3: 0.1}) == [3, 1, 2, 0]
    plan = plan_depth(Size(0.6), Artifact.open(five_layers(tmp_path)), Run())
    measured = {0: 0.9, 1: 0.1, 2: 0.5, 3: 0.2, 4: 0.8}
    assert dispensable(measured, plan) == (1, 3)
    assert one_by_one(plan, ranked(measured)) == (1, 3)
    assert windows(plan) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert best_windows({0: 0.3, 1: 0.2, 2: 0.1, 3: 0.4}, plan) == (2, 3)
    assert plan.words((0, 1, 4)) == "0-1 4"
    assert plan.held() == {}


def test_one_block_cannot_go_and_neither_can_none(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="has one block"):
        plan_of("albert", tmp_path, Size(0.5))
    with pytest.raises(PlanError, match=r"nothing would be taken out of .*: 3 of its 3 blocks"):
        plan_of("llama", tmp_path, Size(1.0))
    with pytest.raises(PlanError, match=r"nothing would be taken out of .*: 7 of its 3 blocks"):
        plan_of("llama", tmp_path, Size(0.5, 7))


@pytest.mark.parametrize(
    ("name", "kept", "fields"),
    [
        ("t5", (0, 2, 3, 4), {"num_layers": 2, "num_decoder_layers": 2}),
        ("t5", (0, 3, 4, 5), {"num_layers": 1, "num_decoder_layers": 3}),
        ("t5-gated", (0, 2, 4), {"num_layers": 2, "num_decoder_layers": 1}),
        ("umt5", (1, 2, 4), {"num_layers": 2, "num_decoder_layers": 1}),
        ("bart", (1, 3, 5, 6), {"encoder_layers": 2, "decoder_layers": 2}),
        ("mbart", (0, 1, 2, 3, 7), {"encoder_layers": 4, "decoder_layers": 1}),
    ],
)
def test_each_stack_has_a_number_of_its_own(
    name: str, kept: tuple[int, ...], fields: dict[str, int], tmp_path: Path
) -> None:
    source = Artifact.open(models_zoo.write(name, tmp_path))
    config = plan_depth(Size(0.7, 1), source, Run()).config(kept)
    assert config is not None
    assert {name: config[name] for name in fields} == fields
    changed = {name for name, value in config.items() if source.config.get(name) != value}
    assert changed <= set(fields)


def test_a_number_that_a_class_takes_from_the_other_stack_is_written_out(tmp_path: Path) -> None:
    folder = models_zoo.write("t5", tmp_path)
    file = folder / "config.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    del document["num_decoder_layers"]
    file.write_text(json.dumps(document), encoding="utf-8")
    config = plan_depth(Size(0.7, (2, 3)), Artifact.open(folder), Run()).config((0, 2, 3, 4, 5))
    assert config is not None
    assert (config["num_layers"], config["num_decoder_layers"]) == (2, 3)


def test_blocks_go_from_their_own_stack(tmp_path: Path) -> None:
    plan = plan_depth(Size(0.7, (2, 2)), Artifact.open(models_zoo.write("bart", tmp_path)), Run())
    assert [(stack.path, stack.size, stack.stay) for stack in plan.stacks] == [
        ("model.encoder.layers", 4, 2),
        ("model.decoder.layers", 3, 2),
    ]
    # All blocks of the encoder do less than any of the decoder.
    measured = {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3, 4: 0.8, 5: 0.9, 6: 0.7}
    assert dispensable(measured, plan) == (0, 2, 6)
    assert one_by_one(plan, ranked(measured)) == (0, 2, 6)
    assert windows(plan) == [(0, 1), (1, 2), (2, 3), (4,), (5,), (6,)]
    assert best_windows({0: 0.5, 1: 0.9, 2: 0.3, 4: 0.2, 5: 0.1, 6: 0.4}, plan) == (2, 3, 5)
    assert plan.words((2, 3, 5)) == "model.encoder.layers 2-3, model.decoder.layers 1"
    assert plan.words((5,)) == "model.decoder.layers 1"
    assert plan.held() == {}


def test_the_block_with_the_bias_of_its_stack_stays(tmp_path: Path) -> None:
    plan = plan_depth(Size(0.7, 2), Artifact.open(models_zoo.write("t5", tmp_path)), Run())
    why = "it alone has layer.0.SelfAttention.relative_attention_bias.weight"
    assert plan.held() == {"encoder.block.0": why, "decoder.block.0": why}
    assert not plan.fits((0, 4))
    assert not plan.fits((1, 3))
    assert dispensable({0: 0.1, 1: 0.3, 2: 0.2, 3: 0.1, 4: 0.2, 5: 0.3}, plan) == (2, 4)
    assert best_windows({0: 0.1, 1: 0.3, 2: 0.2, 3: 0.1, 4: 0.2, 5: 0.3}, plan) == (2, 4)


def test_one_block_in_each_stack_cannot_go(tmp_path: Path) -> None:
    config = models_zoo.configuration("t5")
    config.num_layers = config.num_decoder_layers = 1
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(PlanError, match="T5ForConditionalGeneration has one block in each of its 2 stacks"):
        plan_depth(Size(0.5), Artifact.open(tmp_path / "t5"), Run())


def test_settings_that_depend_on_the_place_keep_a_block_where_it_is(tmp_path: Path) -> None:
    config = models_zoo.configuration("gpt2")
    config.scale_attn_by_inverse_layer_idx = True
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "scaled")
    plan = plan_depth(Size(0.7), Artifact.open(tmp_path / "scaled"), Run())
    assert plan.fits((2,))
    assert not plan.fits((0,))
    assert "other settings in its new place" in plan.refusal
    assert dispensable({0: 0.1, 1: 0.2, 2: 0.3}, plan) == (2,)
