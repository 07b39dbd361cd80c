"""Slicing: the files hold the big model with its residual stream projected, and what cannot be is refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import engine
from compress.core.artifact import Artifact
from compress.core.errors import CalibrationError, PlanError, VerificationError
from compress.core.run import CalibrationSource, Run
from compress.prune.slice import Slice
from compress.sweep.slice_scan import _Scan
from compress.sweep.slice_weights import SliceWeights
from tests import models_zoo
from tests.dummies import Recorder
from tests.marks import slow_but
from tests.single_steps import (
    LENGTH,
    SAMPLES,
    applied,
    calibration,
    decisions,
    killed_and_resumed,
    loaded,
    outputs,
    recipe_of,
    tensors,
)

sliced = partial(applied, "prune.slice")
SLICED = ("llama", "llama-tied", "qwen2-sliding", "qwen3", "mistral", "phi3", "gemma", "granite")
WITHOUT_MEAN = ("phi", "cohere", "starcoder2", "nemotron")
REFUSED = {
    "gpt2": "no configuration of 'gpt2' has another hidden size",
    "opt": "the configuration|no configuration of 'opt'|embed_dim",
    "gpt-neox": "no configuration of 'gpt_neox'|hidden",
    "gemma2": "self_attn.o_proj reaches it through more than a sum",
    "gemma3": "self_attn.o_proj reaches it through more than a sum",
    "olmo2": "self_attn.o_proj reaches it through more than a sum",
    "bert": "enters the residual stream through more than a sum",
    "modernbert": "enters the residual stream through more than a sum",
    "albert": "enters the residual stream through more than a sum",
    "distilbert": "enters the residual stream through more than a sum",
    "mixtral": "mlp.gate.weight reads it and is no linear layer",
    "qwen2-moe": "mlp.gate.weight reads it and is no linear layer",
    "qwen3-moe": "mlp.gate.weight reads it and is no linear layer",
    "gpt-oss": "mlp.router.weight reads it and is no linear layer",
    "t5": r"decoder\.block reads what encoder\.block hands on, so one rotation would have to serve both",
}


def hidden_norms(model: Any) -> list[Any]:
    """Norms over the hidden state; those of heads are narrower."""
    width = model.config.hidden_size
    return [
        module
        for module in model.modules()
        if "Norm" in type(module).__name__ and tuple(module.weight.shape) == (width,)
    ]


@contextmanager
def watching(model: Any, without_mean: bool) -> Iterator[torch.Tensor]:
    """Second moments of what all norms read, each token of one mean square."""
    width = model.config.hidden_size
    moments = torch.zeros(width, width, dtype=torch.float64)

    def watch(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2).double()
        rows = rows - rows.mean(1, keepdim=True) if without_mean else rows
        rows = rows / rows.square().mean(1, keepdim=True).sqrt()
        moments.add_(rows.T @ rows)

    hooks = [norm.register_forward_pre_hook(watch) for norm in hidden_norms(model)]
    yield moments
    for hook in hooks:
        hook.remove()


def span(model: Any, kept: int, without_mean: bool) -> torch.Tensor:
    """The projection onto the first components of the calibration text, ``[width, width]``."""
    with watching(model, without_mean) as moments:
        outputs(model, models_zoo.tokens(SAMPLES, LENGTH))
    _, vectors = torch.linalg.eigh(moments)
    found = vectors[:, -(kept - int(without_mean)) :]
    return (found @ found.T).float()


def projected(model: Any, said: dict[str, Any], without_mean: bool) -> Any:
    """The big model with everything that is written into its residual stream projected."""
    onto = span(model, said["hidden_size"]["got"], without_mean)
    for layer, row in said["layers"].items():
        if "writes" in row["kind"]:
            model.get_submodule(layer).register_forward_hook(lambda _, __, output: output @ onto)
    return model


@pytest.mark.parametrize(
    "name", slow_but(("llama-tied", "granite", "phi", "starcoder2"), [*SLICED, *WITHOUT_MEAN])
)
def test_it_computes_what_the_big_model_does_on_the_components(name: str, tmp_path: Path) -> None:
    source, recorder = models_zoo.write(name, tmp_path), Recorder()
    out = sliced(source, tmp_path / "out", recorder, keep=0.75)
    said = decisions(out)
    assert said["hidden_size"]["got"] == 24
    assert said["keeps_mean"] == (name in WITHOUT_MEAN)
    assert any("hidden size: asked for 24 of 32, got 24" in message for message in recorder.messages)
    small, big = loaded(out.path), loaded(source)
    assert small.config.hidden_size == 24
    assert small.config.intermediate_size == big.config.intermediate_size
    whole = outputs(big)
    expected = outputs(projected(big, said, name in WITHOUT_MEAN))
    assert float((outputs(small) - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
    # Something went, so the model as it was says something else.
    assert float((whole - expected).abs().max()) > 1e-3
    check_written(out, source)


def check_written(out: Artifact, source: Path) -> None:
    """What is said of sizes and of changes is what lies in the files."""
    said = decisions(out)
    before, after = tensors(source), tensors(out.path)
    assert said["parameters"]["after"] == sum(tensor.numel() for tensor in after.values())
    assert said["parameters"]["before"] == sum(tensor.numel() for tensor in before.values())
    assert (after.keys() - before.keys() == set()) != said["untied"]
    assert out.lineage is not None
    changed = {name for name, meant in out.lineage.tensors.items() if meant.changed}
    assert changed >= {name for name in before if after[name].shape != before[name].shape}
    assert len(changed) == said["changed"]
    for name, row in said["layers"].items():
        weight = next(tensor for key, tensor in after.items() if key.endswith(f"{name}.weight"))
        assert list(weight.shape) == [row["rows"], row["columns"]]


@pytest.mark.parametrize(
    "name", slow_but(("gpt2", "opt", "gemma2", "bert", "mixtral", "gpt-oss", "t5"), sorted(REFUSED))
)
def test_what_cannot_be_sliced_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write(name, tmp_path))
    run = Run(calibration=CalibrationSource(calibration(tmp_path)["calibration"]), task="auto")
    with pytest.raises(PlanError, match=REFUSED[name]):
        Slice().check(source, run)


def distances(source: Path, out: Path) -> float:
    """Mean divergence of what a sliced model says on other text from what the big one says."""
    tokens = models_zoo.tokens(8, LENGTH, seed=11)
    wanted = outputs(loaded(source), tokens).log_softmax(-1)
    said = outputs(loaded(out), tokens).log_softmax(-1)
    return float((wanted.exp() * (wanted - said)).sum(-1).mean())


@pytest.mark.parametrize("name", slow_but(("llama-tied",), ("llama-tied", "starcoder2")))
def test_a_repair_comes_nearer_to_the_original(name: str, tmp_path: Path) -> None:
    source = models_zoo.write(name, tmp_path)
    plain = sliced(source, tmp_path / "plain", keep=0.75, samples=64)
    again = sliced(source, tmp_path / "again", keep=0.75, repair=True, samples=64)
    assert distances(source, again.path) < distances(source, plain.path)
    rows = decisions(again)["layers"]
    fitted = [row for row in rows.values() if "repaired_error" in row]
    # All layers but those that write alone and are not the last of their block, and the embedding.
    assert len(fitted) > len(rows) / 2
    assert all(float(row["repaired_error"]) <= float(row["error"]) for row in fitted)
    assert all(row["tokens"] == 64 * LENGTH for row in fitted)
    assert {key: shape(tensor) for key, tensor in tensors(again.path).items()} == {
        key: shape(tensor) for key, tensor in tensors(plain.path).items()
    }


def shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def test_weights_are_those_of_the_formulas(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    old, new = tensors(source), tensors(sliced(source, tmp_path / "out", keep=0.5).path)
    scale = 0.5**0.5
    # The embedding has full rank, so the basis can be read from it.
    basis = (
        torch.linalg.lstsq(old["model.embed_tokens.weight"], new["model.embed_tokens.weight"]).solution
        / scale
    )
    torch.testing.assert_close(basis.T @ basis, torch.eye(16), rtol=1e-4, atol=1e-4)
    prefix = "model.layers.1."
    gain = old[f"{prefix}input_layernorm.weight"]
    for name, expected in {
        f"{prefix}self_attn.q_proj.weight": old[f"{prefix}self_attn.q_proj.weight"] * gain @ basis / scale,
        f"{prefix}mlp.down_proj.weight": scale * basis.T @ old[f"{prefix}mlp.down_proj.weight"],
        f"{prefix}input_layernorm.weight": torch.ones(16),
        "lm_head.weight": old["lm_head.weight"] * old["model.norm.weight"] @ basis / scale,
    }.items():
        torch.testing.assert_close(new[name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "got", "note"),
    [
        pytest.param(
            {"keep": 0.7, "multiple": 8}, 24, "24 is the nearest multiple of 8 to 22", marks=pytest.mark.slow
        ),
        # Llama wants heads that divide the hidden size.
        ({"keep": 0.7, "multiple": 1}, 24, "the configuration class refuses 22: "),
        pytest.param({"keep": 0.5}, 16, "", marks=pytest.mark.slow),
    ],
)
def test_the_hidden_size_is_one_that_fits(
    options: dict[str, Any], got: int, note: str, tmp_path: Path
) -> None:
    said = decisions(sliced(models_zoo.write("llama", tmp_path), tmp_path / "out", **options))
    assert said["hidden_size"]["got"] == got
    assert said["hidden_size"].get("note", "").startswith(note)
    assert said["config"]["hidden_size"] == got


def test_nothing_to_take_out_is_refused(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    run = Run(calibration=CalibrationSource(calibration(tmp_path)["calibration"]))
    with pytest.raises(PlanError, match="all 32 channels would stay"):
        Slice(keep=1.0).check(source, run)
    with pytest.raises(PlanError, match="needs calibration text"):
        Slice().check(source, Run())


def test_half_precision_is_written_as_it_was(tmp_path: Path) -> None:
    source = models_zoo.write("llama-tied", tmp_path, dtype=torch.bfloat16)
    out = sliced(source, tmp_path / "out", keep=0.75)
    assert {tensor.dtype for tensor in tensors(out.path).values()} == {torch.bfloat16}


def test_wrong_weights_are_caught_before_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = SliceWeights.seen
    monkeypatch.setattr(SliceWeights, "seen", lambda self, norm: 2 * seen(self, norm))
    with pytest.raises(VerificationError, match=r"model\.layers\.0 is .* on a projected residual stream"):
        sliced(models_zoo.write("llama", tmp_path), tmp_path / "out")


def test_hidden_states_that_are_not_finite_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = _Scan._unit
    monkeypatch.setattr(_Scan, "_unit", lambda self, hidden: unit(self, hidden * float("nan")))
    with pytest.raises(CalibrationError, match=r"model\.layers\.0: .*NaN or infinite"):
        sliced(models_zoo.write("llama", tmp_path), tmp_path / "out")


@pytest.mark.parametrize(
    ("event", "number", "repair"),
    [
        pytest.param("block.finish", 2, False, marks=pytest.mark.slow),
        ("block.finish", 5, True),
        pytest.param("block.calibrate", 3, False, marks=pytest.mark.slow),
        pytest.param("block.finish", 3, True, marks=pytest.mark.slow),
        pytest.param("block.compare", 4, True, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_resumes_to_the_same_bytes(
    event: str, number: int, repair: bool, tmp_path: Path
) -> None:
    source = models_zoo.write("llama-tied", tmp_path)
    recipe = recipe_of("prune.slice", source, tmp_path, repair=repair)
    again = killed_and_resumed(recipe, tmp_path, event, number)
    assert again.count("block.resume") > 0


@pytest.mark.slow
def test_it_may_be_sliced_again_pruned_and_rounded(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    recipe = recipe_of("prune.slice", source, tmp_path, keep=0.75)
    recipe["steps"] += [
        {"use": "prune.slice", "keep": 0.66},
        {"use": "prune.width", "mlp": 0.5, "heads": 1.0},
        {"use": "quantize.rtn", "group_size": 16},
    ]
    assert engine.run(recipe, tmp_path / "out").final.is_dir()
