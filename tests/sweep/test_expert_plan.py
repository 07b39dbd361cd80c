"""Router and experts are found in every mixture, whatever they are called."""

from pathlib import Path

import pytest
import transformers

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.run import Run
from compress.sweep.config_search import ConfigSearch
from compress.sweep.expert_plan import AskedExperts, plan_experts
from tests import models_zoo

ROUTERS = {
    "mixtral": ("mlp", "gate.weight"),
    "qwen2-moe": ("mlp", "gate.weight"),
    "qwen3-moe": ("mlp", "gate.weight"),
    "gpt-oss": ("mlp", "router.weight"),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_router_experts_and_numbers(name: str, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write(name, tmp_path))
    plan = plan_experts(AskedExperts(0.75), source, Run())
    assert (plan.of, plan.asked, plan.kept, plan.chosen_of, plan.chosen) == (4, 3, 3, 2, 2)
    assert len(plan.mixtures) == 3
    module, router = ROUTERS[name]
    for number, mixture in enumerate(plan.mixtures):
        assert mixture.block == f"model.layers.{number}"
        assert mixture.module == f"{mixture.block}.{module}"
        assert mixture.router == f"{mixture.module}.{router}"
        assert set(mixture.cut.values()) == {0}
        assert f"{mixture.module}.experts.down_proj" in mixture.cut
        assert not any("shared" in parameter for parameter in mixture.cut)
    shapes = ConfigSearch(source, Run()).shapes(plan.config)
    assert shapes is not None
    for parameter, place in plan.mixtures[0].cut.items():
        assert shapes[parameter][place] == 3


def test_blocks_without_a_mixture_are_left_alone(tmp_path: Path) -> None:
    config = models_zoo.configuration("qwen2-moe")
    config.mlp_only_layers = [1]
    transformers.Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    plan = plan_experts(AskedExperts(0.5), Artifact.open(tmp_path / "model"), Run())
    assert [mixture.block for mixture in plan.mixtures] == ["model.layers.0", "model.layers.2"]


def test_the_number_that_a_token_uses_is_lowered_only_where_it_must_be(tmp_path: Path) -> None:
    config = models_zoo.configuration("mixtral")
    config.num_experts_per_tok = 3
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    source = Artifact.open(tmp_path / "model")
    assert plan_experts(AskedExperts(0.75), source, Run()).config["num_experts_per_tok"] == 3
    assert plan_experts(AskedExperts(0.5), source, Run()).config["num_experts_per_tok"] == 2


@pytest.mark.parametrize("name", ["llama", "bert", "albert", "gpt2"])
def test_models_without_experts_are_refused(name: str, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write(name, tmp_path))
    with pytest.raises(PlanError, match="has no experts") as refusal:
        plan_experts(AskedExperts(0.5), source, Run())
    assert refusal.value.hint
