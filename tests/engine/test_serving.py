"""What `compress inspect` says of vLLM, from headers and configuration of real folders."""

import json
from pathlib import Path
from typing import Any

import pytest

from compress import engine
from compress.cli import app
from compress.core.recipe import Recipe, Step
from tests import packed_models


def run(source: Path, out: Path, use: str, **options: Any) -> Path:
    step = Step(use=use, **options)
    engine.run(Recipe(model=str(source), threads=1, device="cpu", steps=(step,)), out, single=True)
    return out


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    return packed_models.floats("llama", tmp_path_factory.mktemp("served") / "floats", **sizes)


def test_a_model_of_floats_is_not_judged(floats: Path) -> None:
    assert "vllm" not in engine.inspect(floats)


def test_a_quantized_model_and_its_conversions(
    floats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    integers = run(floats, tmp_path / "integers", "quantize.rtn", bits=4, group_size=32)
    found = engine.inspect(integers)["vllm"]
    assert (found["loads"], found["least_version"], found["tensor_parallel"]) == (True, "0.5.1", [1])
    gptq = run(integers, tmp_path / "gptq", "export.gptq")
    assert engine.inspect(gptq)["vllm"]["least_version"] == "0.2.6"
    awq = run(integers, tmp_path / "awq", "export.awq")
    assert engine.inspect(awq)["vllm"]["least_version"] == "0.2.0"
    assert app.main(["inspect", str(integers)]) == 0
    printed = capsys.readouterr().out
    assert "least_version: 0.5.1" in printed
    assert "https://github.com/vllm-project/vllm/pull/5385" in printed
    assert app.main(["inspect", str(gptq), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vllm"]["loads"] is True


def test_what_does_not_load_is_named(
    floats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [{"match": "*.k_proj", "bits": 8}]
    out = run(floats, tmp_path / "out", "quantize.rtn", bits=4, group_size=16, overrides=overrides)
    found = engine.inspect(out)["vllm"]
    assert found["loads"] is False
    assert found["least_version"] is None
    said = [entry["layer"] for entry in found["objections"]]
    assert any("(q_proj|k_proj|v_proj): they are one layer there" in line for line in said)
    assert any("down_proj: groups of 16" in line for line in said)
    assert app.main(["inspect", str(out)]) == 0
    assert "they are one layer there" in capsys.readouterr().out


def test_storage_that_nothing_is_known_of_is_said(floats: Path, tmp_path: Path) -> None:
    out = run(floats, tmp_path / "out", "quantize.rtn", bits=4, group_size=32)
    gptq = run(out, tmp_path / "gptq", "export.gptq")
    config = json.loads((gptq / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["checkpoint_format"] = "marlin"
    (gptq / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = engine.inspect(gptq)["vllm"]
    assert found["loads"] == "unknown"
    assert "packed as 'marlin'" in found["unknown"][0]


def test_inputs_that_only_some_layers_quantize_are_nothing_known(floats: Path, tmp_path: Path) -> None:
    out = run(floats, tmp_path / "out", "quantize.rtn", bits=8, group_size="channel", activations="dynamic")
    assert engine.inspect(out)["vllm"]["least_version"] == "0.6.0"
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    groups = config["quantization_config"]["config_groups"]
    (group,) = groups.values()
    groups["group_1"] = {**group, "targets": ["re:.*k_proj"], "input_activations": None}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = engine.inspect(out)["vllm"]
    assert found["loads"] == "unknown"
    assert "some layers quantize their inputs" in found["unknown"][0]
