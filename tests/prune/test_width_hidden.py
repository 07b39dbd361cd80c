"""The hidden size cut: the files hold the big model without some channels of its residual stream.

What "without" means is built here anew, by hand: nothing enters a channel that went, and every norm is
computed over the channels that stayed, from its definition.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.run import CalibrationSource, Run
from compress.prune.width import Width
from tests import models_zoo
from tests.marks import slow_but
from tests.prune.test_width import prune, without
from tests.single_steps import calibration, decisions, killed_and_resumed, loaded, numbers, recipe_of

WIDTH = 32


class OverKept(nn.Module):
    """A norm from its definition, over some channels; the others are zero."""

    def __init__(self, norm: nn.Module, channels: list[int]) -> None:
        super().__init__()
        self.channels = channels
        self.weight = norm.weight
        self.bias = getattr(norm, "bias", None)
        centred = isinstance(norm, nn.LayerNorm)
        self.centred = centred
        self.epsilon = norm.eps if centred else getattr(norm, "variance_epsilon", getattr(norm, "eps", None))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        some = values[..., self.channels].double()
        if self.centred:
            some = some - some.mean(-1, keepdim=True)
        some = some / (some.square().mean(-1, keepdim=True) + self.epsilon).sqrt()
        some = some.float() * self.weight[self.channels]
        if self.bias is not None:
            some = some + self.bias[self.channels]
        whole = torch.zeros_like(values)
        whole[..., self.channels] = some
        return whole


def without_channels(model: Any, channels: list[int]) -> Any:
    """A model of the old shape in which the other channels of the stream carry nothing."""
    gone = [channel for channel in range(WIDTH) if channel not in channels]
    for name, module in list(model.named_modules()):
        of_queries = name.endswith(("q_norm", "k_norm"))
        if "Norm" in type(module).__name__ and module.weight.shape == (WIDTH,) and not of_queries:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, OverKept(module, channels))
        # Whatever enters the stream is stopped: embeddings are as wide as it.
        elif isinstance(module, nn.Embedding) and module.weight.shape[1] == WIDTH:
            with torch.no_grad():
                module.weight[:, gone] = 0
        elif name.endswith("hidden_mapping_in"):
            with torch.no_grad():
                module.weight[gone] = 0
                module.bias[gone] = 0
    return model


def outputs(model: Any) -> list[torch.Tensor]:
    tokens = models_zoo.tokens(3, 12, seed=7)
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        said = model(input_ids=tokens, **more)
    return [said.logits if "logits" in said else said.last_hidden_state]


ALONE = ("llama", "llama-tied", "qwen2-sliding", "qwen3", "mistral", "phi", "phi3", "olmo2")
TOGETHER = ("gpt2", "opt", "gpt-neox", "bert", "distilbert", "modernbert", "albert")


@pytest.mark.parametrize("name", slow_but(("llama", "bert"), [*ALONE, *TOGETHER, "t5-model"]))
def test_it_computes_what_the_big_model_does_without_these_channels(name: str, tmp_path: Path) -> None:
    source = models_zoo.write(name, tmp_path)
    heads = 0.75 if name in TOGETHER else 1.0
    around = {"task": "feature-extraction"} if name == "t5-model" else {}
    out = prune(source, tmp_path / "out", mlp=0.5, heads=heads, hidden=0.75, multiple=8, around=around)
    said = decisions(out)
    assert said["shape"]["hidden"]["got"] == 24
    small, big = loaded(out.path), loaded(source)
    channels = numbers(said["hidden_kept"])
    assert len(channels) == 24
    big = without(without_channels(big, channels), said["layers"])
    (expected,), (found,) = outputs(big), outputs(small)
    if found.shape[-1] == 24:
        expected = expected[..., channels]
    assert float((found - expected).abs().max()) <= 1e-5


def test_what_multiplies_with_the_hidden_size_is_refused_by_the_plan(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("gemma2", tmp_path))
    run = Run(calibration=CalibrationSource(calibration(tmp_path)["calibration"]))
    with pytest.raises(PlanError, match=r"embed_tokens\.\w+ would be"):
        Width(keep=1, hidden=0.75, multiple=8).check(source, run)


def test_experts_that_lie_on_disk_one_by_one_are_refused(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("mixtral", tmp_path))
    run = Run(calibration=CalibrationSource(calibration(tmp_path)["calibration"]))
    with pytest.raises(PlanError, match=r"experts\.\w+ is converted while transformers loads it"):
        Width(keep=1, hidden=0.75, multiple=8).check(source, run)


def test_heads_that_are_as_many_channels_have_to_be_asked_for_too(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("bert", tmp_path))
    run = Run(calibration=CalibrationSource(calibration(tmp_path)["calibration"]))
    with pytest.raises(PlanError, match="24 of 32 channels of the hidden state cannot be kept") as refused:
        Width(keep=1, hidden=0.75, multiple=8).check(source, run)
    assert "--heads" in refused.value.hint


@pytest.mark.parametrize(
    "importance", slow_but(("taylor", "magnitude"), ("activation", "taylor", "magnitude"))
)
def test_channels_of_the_stream_count_by_what_was_asked(importance: str, tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    out = prune(source, tmp_path / "out", keep=0.5, hidden=0.5, multiple=8, importance=importance)
    said = decisions(out)
    model = loaded(source)
    sums, parts = by_hand(model, importance)
    assert numbers(said["hidden_kept"]) == sorted(sums.topk(16).indices.tolist())
    for name, row in said["layers"].items():
        if row["kind"] == "mlp" and importance != "activation":
            best = parts[name].topk(row["kept_parts"]).indices
            assert numbers(row["kept"]) == sorted(best.tolist())


def by_hand(model: Any, importance: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Importance of channels of the stream and of MLP channels, by layer, from the definitions."""
    tokens = models_zoo.tokens(6, 16)
    norms = [f"model.layers.{n}.{which}_layernorm" for n in range(3) for which in ("input", "post_attention")]
    if importance == "magnitude":
        sums = torch.zeros(WIDTH)
        for name, weight in model.named_parameters():
            squares = weight.detach().square()
            reads = weight.dim() == 2 and not name.endswith(("o_proj.weight", "down_proj.weight"))
            sums += squares if weight.dim() == 1 else squares.sum(0 if reads else 1)
        return sums, {
            f"model.layers.{n}.mlp.down_proj": layer.mlp.down_proj.weight.detach().square().sum(0)
            + layer.mlp.up_proj.weight.detach().square().sum(1)
            + layer.mlp.gate_proj.weight.detach().square().sum(1)
            for n, layer in enumerate(model.model.layers)
        }
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, values: torch.Tensor) -> None:
        if values.requires_grad:
            values.retain_grad()
        seen[name] = values

    for name in norms if importance == "activation" else [*norms, "model.norm"]:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
    for n in range(3):
        name = f"model.layers.{n}.mlp.down_proj"
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
    logits = model(input_ids=tokens).logits
    if importance == "activation":
        return sum(seen[name].abs().mean(1).square().sum(0).sqrt() for name in norms), {}
    flat = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    flat.mean(1).sum().backward()
    found = {name: (x * x.grad).sum(1).square().sum(0).sqrt().detach() for name, x in seen.items()}
    return sum(found[name] for name in [*norms, "model.norm"]), found


def test_gradients_need_a_loss(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("bert", tmp_path))
    run = Run(calibration=CalibrationSource(calibration(tmp_path)["calibration"]))
    with pytest.raises(PlanError, match="taylor needs a loss"):
        Width(importance="taylor").check(source, run)


def test_key_value_groups_go_with_their_heads(tmp_path: Path) -> None:
    source = models_zoo.write("qwen3-eight", tmp_path)
    out = prune(source, tmp_path / "a" / "out", mlp=1.0, key_value_groups=0.5)
    heads = decisions(out)["shape"]["heads"]
    assert (heads["got"], heads["key_value_got"]) == (4, 1)
    out = prune(source, tmp_path / "b" / "out", mlp=1.0, key_value_groups=0.5, heads=0.25)
    heads = decisions(out)["shape"]["heads"]
    assert (heads["got"], heads["key_value_got"]) == (2, 1)


def test_layers_that_read_the_stream_are_fitted_to_what_they_said(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    plain = prune(source, tmp_path / "a" / "out", keep=1, hidden=0.5, multiple=8)
    out = prune(source, tmp_path / "b" / "out", keep=1, hidden=0.5, multiple=8, repair=True)
    said = decisions(out)
    assert numbers(said["hidden_kept"]) == numbers(decisions(plain)["hidden_kept"])
    assert set(said["layers"]) == {
        f"model.layers.{n}.{layer}"
        for n in range(3)
        for layer in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        )
    }
    for row in said["layers"].values():
        assert float(row["repaired_error"]) < float(row["error"])


@pytest.mark.parametrize(
    ("event", "number"),
    [
        pytest.param("block.start", 2, marks=pytest.mark.slow),
        pytest.param("block.calibrate", 2, marks=pytest.mark.slow),
        ("shard.tensor", 25),
    ],
)
def test_a_run_that_is_killed_resumes_to_the_same_bytes(event: str, number: int, tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    recipe = recipe_of("prune.width", source, tmp_path, keep=0.5, hidden=0.5, multiple=8)
    killed_and_resumed(recipe, tmp_path, event, number)
