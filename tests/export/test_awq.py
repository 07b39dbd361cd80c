"""The pass as its users run it: what is written, what is verified, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress import engine
from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.core.facts import Fact
from compress.core.recipe import Recipe, Step
from compress.core.run import Run
from compress.export.awq import Awq
from compress.formats.awq import Awq as Format
from tests import packed_models


def converted(source: Path, out: Path, **options: object) -> Path:
    steps = (Step(use="export.awq", **options),)
    engine.run(Recipe(model=str(source), threads=1, device="cpu", steps=steps), out, single=True)
    return out


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_models.floats("qwen2", tmp_path_factory.mktemp("awq") / "floats")


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_integers_are_the_same(floats: Path, tmp_path: Path, symmetric: bool) -> None:
    source = packed_models.integers(
        floats, tmp_path / "integers", symmetric=symmetric, leave=("lm_head", "layers.1.mlp.down_proj")
    )
    out = converted(source, tmp_path / "out")
    artifact = Artifact.open(out)
    assert artifact.facts == {Fact.AWQ_CHECKPOINT, Fact.INTEGER_WEIGHTS}
    quantization = artifact.config["quantization_config"]
    assert quantization["modules_to_not_convert"] == ["model.layers.1.mlp.down_proj"]
    tensors, expected = load_file(out / "model.safetensors"), packed_models.dequantized(source)
    stems = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(stems) == 13
    for stem in stems:
        parts = {part: tensors[f"{stem}.{part}"] for part in ("qweight", "qzeros", "scales")}
        value = Format().read(parts, stem, quantization).value()
        assert torch.equal(value.double(), expected[f"{stem}.weight"])
    bias = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(tensors[bias].double(), expected[bias])
    verified = engine.verify(out).weights
    assert verified is not None
    assert verified.changed == 13
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["model_type"] == "qwen2"


def test_other_bits_are_refused_when_it_is_planned(floats: Path, tmp_path: Path) -> None:
    source = packed_models.integers(floats, tmp_path / "integers", bits=8)
    with pytest.raises(PlanError, match="has 4 bits, not 8"):
        Awq().check(Artifact.open(source), Run())


def test_a_float_model_is_refused_by_its_facts(floats: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"export\.awq\) needs integer weights"):
        engine.plan(Recipe(model=str(floats), steps=(Step(use="export.awq"),)), tmp_path / "out", single=True)
