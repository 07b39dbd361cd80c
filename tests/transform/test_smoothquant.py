"""SmoothQuant: the files compute what they computed, and the factors are those of the paper."""

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.core.artifact import Artifact
from compress.core.errors import CalibrationError, PlanError, UsageError, VerificationError
from compress.core.run import CalibrationSource, Run
from compress.models import folds
from compress.numerics.smoothing import Magnitudes, Reading, smoothing_scales
from compress.transform.smoothquant import SmoothQuant
from tests import models_zoo
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

WITHOUT_NORMS = ("bert", "albert")
"""Architectures whose norms follow the residual sum, so that none feeds linear layers alone."""


def same(source: Path, out: Path) -> None:
    """The two models say the same, by their logits or hidden states in float32."""
    before, after = outputs(loaded(source, torch.float32)), outputs(loaded(out, torch.float32))
    assert float((before - after).abs().max()) <= 1e-4 * float(before.abs().max())


def check_changed(source: Path, out: Artifact) -> None:
    """What the lineage says was changed is what differs, and every layer is folded or named."""
    before, after = tensors(source), tensors(out.path)
    assert before.keys() == after.keys()
    assert out.lineage is not None
    changed = {name for name, meant in out.lineage.tensors.items() if meant.changed}
    assert changed == {name for name in after if not torch.equal(before[name], after[name])}
    assert len(changed) == decisions(out)["changed"] > 0


@pytest.mark.parametrize(
    "name",
    slow_but(
        ("llama", "mixtral", "gpt2", "gemma2"),
        [name for name in models_zoo.CONFIGURATIONS if name not in WITHOUT_NORMS],
    ),
)
def test_the_model_computes_what_it_computed(name: str, tmp_path: Path) -> None:
    source = models_zoo.write(name, tmp_path)
    out = applied("transform.smoothquant", source, tmp_path / "out", producers="all")
    same(source, out.path)
    check_changed(source, out)
    said = decisions(out)
    for row in said["layers"].values():
        # Experts of a mixture see a token as often as it is sent to one.
        assert row["tokens"] in (SAMPLES * LENGTH, 2 * SAMPLES * LENGTH)
        assert float(row["smallest"]) < float(row["largest"])


@pytest.mark.parametrize("name", WITHOUT_NORMS)
def test_norms_after_the_residual_sum_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    source = models_zoo.write(name, tmp_path)
    with pytest.raises(PlanError, match=r"no layer's input can be scaled.*--producers all"):
        applied("transform.smoothquant", source, tmp_path / "out")
    out = applied("transform.smoothquant", source, tmp_path / "out", producers="all")
    same(source, out.path)
    reasons = decisions(out)["unfolded"]
    assert any("beyond its block" in reason for reason in reasons.values())


def test_the_factors_are_those_of_the_paper(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    out = applied("transform.smoothquant", source, tmp_path / "out", alpha=0.75)
    assert decisions(out)["folds"] == 6
    inputs: dict[str, torch.Tensor] = {}
    for folder in (source, out.path):
        model = loaded(folder, torch.float32)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(
                    lambda _, args, key=f"{folder} {name}": inputs.__setitem__(
                        key, args[0].abs().amax((0, 1))
                    )
                )
        with torch.no_grad():
            model(input_ids=models_zoo.tokens(SAMPLES, LENGTH))
    old, new = tensors(source), tensors(out.path)
    for position in range(3):
        for layers in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("mlp.gate_proj", "mlp.up_proj"),
        ):
            names = [f"model.layers.{position}.{layer}" for layer in layers]
            largest = torch.stack([old[f"{name}.weight"].abs().amax(0) for name in names]).amax(0)
            before = inputs[f"{source} {names[0]}"]
            scales = before**0.75 / largest**0.25
            # The activations' maxima after smoothing are max|X|^(1-a) max|W|^(1-a).
            torch.testing.assert_close(
                inputs[f"{out.path} {names[0]}"], before / scales, rtol=1e-4, atol=1e-6
            )
            torch.testing.assert_close(
                inputs[f"{out.path} {names[0]}"], (before * largest) ** 0.25, rtol=1e-4, atol=1e-6
            )
            for name in names:
                torch.testing.assert_close(
                    new[f"{name}.weight"], old[f"{name}.weight"] * scales, rtol=1e-4, atol=1e-6
                )


def test_columns_of_one_channel_share_a_factor_and_unused_ones_keep_theirs() -> None:
    rows = torch.tensor([[1.0, -8.0, 0.0, 2.0], [4.0, 2.0, 0.0, -1.0]])
    weight = torch.tensor([[1.0, 0.5, 3.0, 0.0], [-2.0, 0.25, 1.0, 0.0]])
    gathered = Magnitudes(4)
    gathered.add(rows)
    shared = smoothing_scales([Reading(weight, gathered, torch.tensor([0, 0, 1, 2]))], 3, 0.5)
    # max(4, 8) and max(2, 0.5); a channel without input; a channel without weights.
    torch.testing.assert_close(shared, torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(gathered.mean, torch.tensor([2.5, 5.0, 0.0, 1.5]))


def test_norms_alone_leave_other_layers_and_ignored_layers_stay(tmp_path: Path) -> None:
    source = models_zoo.write("qwen3", tmp_path)
    out = applied(
        "transform.smoothquant",
        source,
        tmp_path / "out",
        ignore=["model.layers.0.*", "*.layers.1.mlp.up_proj"],
    )
    said = decisions(out)
    assert sorted(said["layers"]) == [
        "model.layers.1.input_layernorm",
        "model.layers.2.input_layernorm",
        "model.layers.2.post_attention_layernorm",
    ]
    assert said["unfolded"]["model.layers.1.mlp.gate_proj"] == "ignored"
    assert "norms alone" in said["unfolded"]["model.layers.2.mlp.down_proj"]
    with pytest.raises(UsageError, match="matches no module"):
        applied("transform.smoothquant", source, tmp_path / "b" / "out", ignore=["nothing"])


def test_half_precision_is_written_as_it_was(tmp_path: Path) -> None:
    source = models_zoo.write("gemma2", tmp_path, dtype=torch.bfloat16)
    out = applied("transform.smoothquant", source, tmp_path / "out")
    assert {tensor.dtype for tensor in tensors(out.path).values()} == {torch.bfloat16}
    before, after = outputs(loaded(source, torch.float32)), outputs(loaded(out.path, torch.float32))
    assert float((before - after).norm()) < 0.05 * float(before.norm())


def test_a_wrong_fold_is_caught_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models_zoo.write("llama", tmp_path)
    of = folds.Rescaling.of

    def shifted(self: Any, tensor: torch.Tensor) -> torch.Tensor:
        return of(self, tensor) if tensor.dim() == 1 else of(self, tensor).roll(1, -1)

    monkeypatch.setattr(folds.Rescaling, "of", shifted)
    with pytest.raises(VerificationError, match="away from itself"):
        applied("transform.smoothquant", source, tmp_path / "out")


def test_inputs_that_are_not_finite_are_an_error_that_names_the_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = models_zoo.write("llama", tmp_path)
    add = Magnitudes.add
    monkeypatch.setattr(Magnitudes, "add", lambda self, rows: add(self, rows * float("inf")))
    with pytest.raises(CalibrationError, match=r"model\.layers\.0\.input_layernorm: .*NaN or infinite"):
        applied("transform.smoothquant", source, tmp_path / "out")


def test_calibration_text_is_needed(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    with pytest.raises(PlanError, match="needs calibration text"):
        SmoothQuant().check(source, Run())
    data = calibration(tmp_path)
    needs = SmoothQuant().check(
        source, Run(calibration=CalibrationSource(data["calibration"], SAMPLES, LENGTH))
    )
    assert needs.disk_bytes > sum(file.stat().st_size for file in source.weight_files) * 0.9


@pytest.mark.parametrize(
    ("event", "number"),
    [
        ("shard.tensor", 20),
        pytest.param("block.calibrate", 6, marks=pytest.mark.slow),
        pytest.param("block.finish", 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_resumes_to_the_same_bytes(event: str, number: int, tmp_path: Path) -> None:
    source = models_zoo.write("opt", tmp_path)
    recipe = recipe_of("transform.smoothquant", source, tmp_path, producers="all")
    again = killed_and_resumed(recipe, tmp_path, event, number)
    assert again.count("block.resume") > 0
    assert again.count("block.resume") + again.count("block.start") == 4
