"""The plan of a narrower stream: factors of embeddings, norms that are asked, and configurations."""

from pathlib import Path

import pytest
import torch
from torch import nn

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.run import Run
from compress.models.folds import Fold
from compress.models.stream import Stream
from compress.sweep import slice_plan
from compress.sweep.slice_plan import SlicePlan, Width, plan_slicing, same_norm
from tests import models_zoo


def planned(name: str, folder: Path, share: float = 0.75) -> SlicePlan:
    return plan_slicing(Width(share), Artifact.open(models_zoo.write(name, folder)), Run())


def test_what_an_embedding_multiplies_by_may_follow_the_hidden_size(tmp_path: Path) -> None:
    # Gemma multiplies by the root of the hidden size, Granite by a number of the configuration.
    factors = planned("gemma", tmp_path).factors
    assert list(factors) == ["model.embed_tokens"]
    assert factors["model.embed_tokens"] == pytest.approx((32 / 24) ** 0.5)
    assert planned("granite", tmp_path).factors == {}


def test_heads_and_mlp_stay_as_wide_as_they_are(tmp_path: Path) -> None:
    plan = planned("phi3", tmp_path)
    assert plan.config["hidden_size"] == 24
    assert plan.config["head_dim"] == 8
    assert plan.shapes["model.layers.0.self_attn.qkv_proj.weight"] == (64, 24)
    assert plan.shapes["model.layers.0.mlp.down_proj.weight"] == (24, 64)


class RmsNorm(nn.Module):
    """A norm over a number of channels that may be another than there are."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.count = count

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        squares = values.square().sum(-1, keepdim=True) / self.count
        return values / (squares + 1e-5).sqrt() * self.weight


def test_a_norm_that_keeps_the_old_width_is_found_out() -> None:
    norm = Fold("", "norm", "norm", torch.arange(16), (), {"weight": 0.0})
    stream = Stream(16, False, (), (), (norm,), {})
    assert same_norm(RmsNorm(16, 16), RmsNorm(8, 8), norm, stream)
    assert not same_norm(RmsNorm(16, 16), RmsNorm(8, 16), norm, stream)


@pytest.mark.parametrize("keeps_mean", [False, True])
def test_a_layer_norm_fits_where_the_mean_is_kept_out(keeps_mean: bool) -> None:
    norm = Fold("", "norm", "norm", torch.arange(16), (), {"weight": 0.0, "bias": 0.0})
    stream = Stream(16, keeps_mean, (), (), (norm,), {})
    assert same_norm(nn.LayerNorm(16), nn.LayerNorm(8), norm, stream) == keeps_mean


def test_a_narrow_norm_that_does_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slice_plan, "same_norm", lambda *_: False)
    with pytest.raises(PlanError, match=r"model\.layers\.0\.input_layernorm does something else to fewer"):
        planned("mistral", tmp_path)
