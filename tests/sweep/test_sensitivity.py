"""What rounding a part alone does to the output, held against a plain forward pass in float64."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.run import CalibrationSource, Run
from compress.core.scheme import Scheme
from compress.formats.compressed_tensors import CompressedTensors
from compress.models.checkpoint import Checkpoint
from compress.numerics.affine import ClipSearch, round_to_nearest
from compress.quantize.rtn import Rtn
from compress.sweep.selection import select
from compress.sweep.sensitivity import EXPERTS, Sensitivity, measure
from compress.sweep.walk import placed_skeleton
from tests import models_zoo
from tests.marks import slow_but


def measured(source: Artifact, run: Run, *bits: int) -> list[Sensitivity]:
    model = placed_skeleton(source, run)
    checkpoint = Checkpoint(source, model)
    rounder = Rtn(bits=4, group_size=16, integer_range="full", fallback="channel")
    selection = select(rounder, model, checkpoint, CompressedTensors())
    return measure(source, model, checkpoint, selection, bits, run)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    save_file({"input_ids": models_zoo.tokens(6, 12)}, tmp_path / "tokens.safetensors")
    text = CalibrationSource(str(tmp_path / "tokens.safetensors"), 6, 12, batch_size=4)
    return Run(calibration=text, scratch=tmp_path / "scratch")


def divergence(model: Any, part: tuple[str, ...], bits: int) -> float:
    """The same by stock transformers: all weights in memory, the part replaced, one forward pass."""
    tokens = models_zoo.tokens(6, 12)
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits.double().log_softmax(-1)
        for name in part:
            weight = model.get_parameter(f"{name}.weight")
            rounded = round_to_nearest(weight, Scheme(bits, 16), torch.float32, search=ClipSearch())
            weight.copy_(rounded.dequantize())
        said = model(input_ids=tokens).logits.double().log_softmax(-1)
    return float((wanted.exp() * (wanted - said)).sum(-1).mean())


@pytest.mark.parametrize(
    "name", slow_but(("llama-tied", "gemma3"), ("llama-tied", "qwen2-sliding", "gemma3", "phi"))
)
def test_it_is_the_divergence_of_a_plain_forward_pass(name: str, run: Run, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write(name, tmp_path))
    found = measured(source, run, 3, 8)
    assert len(found) == len({part.part for part in found}) > 6
    for part in found[:: len(found) // 4]:
        for bits in (3, 8):
            model = transformers.AutoModelForCausalLM.from_pretrained(source.path).eval()
            expected = divergence(model, part.part, bits)
            assert part.divergence[bits] == pytest.approx(expected, rel=2e-2, abs=1e-7)
        assert part.divergence[3] > part.divergence[8]


def test_a_part_is_what_reads_one_input(run: Run, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    parts = [part.part for part in measured(source, run, 4)]
    attention = [f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkv"]
    assert sorted(attention) in [sorted(part) for part in parts]
    assert ["model.layers.2.mlp.down_proj"] in [list(part) for part in parts]
    assert len(parts) == 3 * 4
    shapes = {"qkv": 32 * 32 + 2 * 16 * 32}
    first = next(part for part in measured(source, run, 4) if attention[0] in part.part)
    assert first.weights == shapes["qkv"]
    assert first.tie == first.part[0]


def test_all_experts_are_one(run: Run, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("mixtral", tmp_path))
    experts = [part for part in measured(source, run, 4) if part.tie == EXPERTS]
    assert len(experts) == 3  # measured block by block, and tied afterwards
    assert all(len(part.part) == 2 * 4 for part in experts)
    assert all(part.divergence[4] > 0 for part in experts)


def test_what_was_measured_is_not_measured_again(run: Run, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    found = measured(source, run, 4)
    file = run.scratch / "sensitivity.jsonl"
    lines = file.read_text().splitlines()
    kept = json.loads(lines[0]) | {"divergence": {"4": 7.0}}
    # The second is of other bits, and the last was cut by a crash.
    other = json.loads(lines[1]) | {"divergence": {"3": 7.0}}
    file.write_text("\n".join([json.dumps(kept), json.dumps(other), *lines[2:-1], lines[-1][:20]]))
    again = measured(source, run, 4)
    assert again[0].divergence == {4: 7.0}
    assert again[1:] == found[1:]


def test_what_cannot_be_measured_is_refused(run: Run, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("bert", tmp_path))
    with pytest.raises(PlanError, match="feature-extraction has none"):
        measured(source, run, 4)
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    with pytest.raises(PlanError, match="measured on calibration text"):
        measured(source, replace(run, calibration=None), 4)
