"""Rotation: the files compute what they computed, outliers are gone, and what cannot turn is refused."""

from functools import partial
from pathlib import Path

import pytest
import torch

from compress import engine
from compress.core.artifact import Artifact
from compress.core.errors import ModelError, PlanError, VerificationError
from compress.core.run import Run
from compress.numerics.rotation import rotation
from compress.sweep.rotation_weights import Turns
from compress.transform.rotate import Rotate
from tests import models_zoo
from tests.marks import slow_but
from tests.single_steps import applied, decisions, killed_and_resumed, loaded, outputs, recipe_of, tensors
from tests.transform.test_smoothquant import check_changed, same

TURN = ("llama", "llama-tied", "qwen2-sliding", "qwen3", "mistral", "phi3")
KEEP_MEAN = ("gpt2", "opt", "gpt-neox", "phi")
REFUSED = {
    "gemma2": "self_attn.o_proj reaches it through more than a sum",
    "gemma3": "self_attn.o_proj reaches it through more than a sum",
    "bert": "enters the residual stream through more than a sum",
    "modernbert": "enters the residual stream through more than a sum",
    "albert": "enters the residual stream through more than a sum",
    "distilbert": "enters the residual stream through more than a sum",
    "mixtral": "mlp.gate.weight reads it and is no linear layer",
    "qwen2-moe": "mlp.gate.weight reads it and is no linear layer",
    "qwen3-moe": "mlp.gate.weight reads it and is no linear layer",
    "gpt-oss": "mlp.router.weight reads it and is no linear layer",
}

rotated = partial(applied, "transform.rotate", samples=0)


@pytest.mark.parametrize("name", slow_but(("llama-tied", "qwen3", "gpt2"), [*TURN, *KEEP_MEAN]))
def test_the_model_computes_what_it_computed(name: str, tmp_path: Path) -> None:
    source = models_zoo.write(name, tmp_path)
    out = rotated(source, tmp_path / "out")
    same(source, out.path)
    said = decisions(out)
    assert said["keeps_mean"] == (name in KEEP_MEAN)
    assert said["heads"] == [8]
    config = Artifact.open(out.path).config
    if said["untied"]:
        assert config["tie_word_embeddings"] is False
        assert name in ("llama-tied", "gpt2")
    else:
        check_changed(source, out)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_turn_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write(name, tmp_path))
    with pytest.raises(PlanError, match=REFUSED[name]):
        Rotate().check(source, Run())


def test_weights_are_those_of_the_formulas(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    old, new = tensors(source), tensors(rotated(source, tmp_path / "out", heads=False, rotation_seed=5).path)
    turn = rotation(32, 5).float()
    prefix = "model.layers.1."
    gain = old[f"{prefix}input_layernorm.weight"]
    for name, expected in {
        "model.embed_tokens.weight": old["model.embed_tokens.weight"] @ turn,
        f"{prefix}self_attn.q_proj.weight": old[f"{prefix}self_attn.q_proj.weight"] * gain @ turn,
        f"{prefix}mlp.down_proj.weight": turn.T @ old[f"{prefix}mlp.down_proj.weight"],
        f"{prefix}input_layernorm.weight": torch.ones(32),
        "lm_head.weight": old["lm_head.weight"] * old["model.norm.weight"] @ turn,
        "model.norm.weight": torch.ones(32),
    }.items():
        torch.testing.assert_close(new[name], expected, rtol=1e-4, atol=1e-5)


def test_values_of_heads_turn_head_by_head(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    plain = tensors(rotated(source, tmp_path / "plain", heads=False).path)
    mixed = tensors(rotated(source, tmp_path / "mixed").path)
    turn = rotation(8, 1).float()
    prefix = "model.layers.2.self_attn."
    values = plain[f"{prefix}v_proj.weight"].view(2, 8, 32)
    torch.testing.assert_close(
        mixed[f"{prefix}v_proj.weight"], (turn.T @ values).view(16, 32), rtol=1e-4, atol=1e-5
    )
    read = plain[f"{prefix}o_proj.weight"].view(32, 4, 8)
    torch.testing.assert_close(
        mixed[f"{prefix}o_proj.weight"], (read @ turn).view(32, 32), rtol=1e-4, atol=1e-5
    )
    differing = {name for name in plain if not torch.equal(plain[name], mixed[name])}
    assert differing == {
        f"model.layers.{block}.self_attn.{layer}.weight"
        for block in range(3)
        for layer in ("v_proj", "o_proj")
    }


def with_outliers(folder: Path) -> Path:
    """A model whose hidden state has two channels of large weights."""
    model = models_zoo.build("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(
                ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
            ):
                parameter[:, [3, 17]] *= 20
    model.save_pretrained(folder / "outliers")
    return folder / "outliers"


def test_outliers_are_spread_over_all_channels(tmp_path: Path) -> None:
    out = rotated(with_outliers(tmp_path), tmp_path / "out")
    rows = decisions(out)["layers"]
    readers = [
        row for row in rows.values() if row["kind"] == "reads" and row["rows"] != models_zoo.VOCABULARY
    ]
    assert len(readers) == 12
    for row in readers:
        assert float(row["kurtosis_before"]) > 20
        assert float(row["kurtosis_after"]) < 6


def test_what_a_norm_adds_is_not_divided_by_nothing(tmp_path: Path) -> None:
    model = models_zoo.build("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight[4] = 0
    model.save_pretrained(tmp_path / "model")
    # The head has no bias that could take what the last norm adds.
    with pytest.raises(
        ModelError, match=r"transformer\.ln_f adds to 1 channels that it multiplies by nothing"
    ):
        rotated(tmp_path / "model", tmp_path / "out")
    with torch.no_grad():
        model.transformer.ln_f.bias[4] = 0
        model.transformer.h[0].ln_1.weight[7] = 0
    model.save_pretrained(tmp_path / "model")
    same(tmp_path / "model", rotated(tmp_path / "model", tmp_path / "out").path)


def test_half_precision_is_written_as_it_was(tmp_path: Path) -> None:
    source = models_zoo.write("llama-tied", tmp_path, dtype=torch.bfloat16)
    out = rotated(source, tmp_path / "out")
    assert {tensor.dtype for tensor in tensors(out.path).values()} == {torch.bfloat16}
    before, after = outputs(loaded(source, torch.float32)), outputs(loaded(out.path, torch.float32))
    assert float((before - after).norm()) < 0.05 * float(before.norm())


def test_a_wrong_turn_is_caught_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models_zoo.write("llama", tmp_path)
    of_norm = Turns.of_norm
    monkeypatch.setattr(
        Turns, "of_norm", lambda self, norm: {name: 2 * new for name, new in of_norm(self, norm).items()}
    )
    with pytest.raises(VerificationError, match="after its rotation is"):
        rotated(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("event", "number"),
    [
        ("block.finish", 2),
        pytest.param("block.compare", 2, marks=pytest.mark.slow),
        pytest.param("block.compare", 4, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_resumes_to_the_same_bytes(event: str, number: int, tmp_path: Path) -> None:
    source = models_zoo.write("llama-tied", tmp_path)
    recipe = recipe_of("transform.rotate", source, tmp_path, samples=0)
    again = killed_and_resumed(recipe, tmp_path, event, number)
    assert again.count("block.resume") > 0
    assert again.count("block.resume") + again.count("block.start") == 4


@pytest.mark.slow
def test_it_may_be_scaled_and_rounded_afterwards(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    recipe = {
        "model": str(source),
        "steps": [{"use": "transform.rotate"}, {"use": "quantize.rtn", "group_size": 16}],
        "threads": 1,
    }
    assert engine.run(recipe, tmp_path / "out").final.is_dir()
