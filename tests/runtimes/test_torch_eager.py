"""Stock transformers: the same numbers, a cache that continues the prompt, and no random weight."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress import engine
from compress.core.artifact import Artifact
from compress.core.errors import ModelError, UsageError
from compress.formats.compressed_tensors import read_floats, read_matrix
from compress.models.tasks import resolve
from compress.numerics.floats import from_e2m1, to_e2m1, to_e4m3
from compress.runtimes import Placement, Session, Unavailable, find, names
from tests import models_zoo, quantized_models
from tests.marks import slow_but


def session(folder: Path, dtype: str = "float32", task: str = "auto") -> Session:
    artifact = Artifact.open(folder)
    return find("torch-eager").load(artifact, resolve(task, artifact.config), Placement(dtype=dtype))


def test_names_are_those_of_the_files() -> None:
    assert names() == ["onnxruntime", "torch-eager", "torch-int4"]
    with pytest.raises(UsageError, match="did you mean 'torch-eager'"):
        find("torch-eeger")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bert"])
def test_outputs_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    folder = models_zoo.write(name, tmp_path)
    tokens = models_zoo.tokens()
    with torch.no_grad():
        result = models_zoo.build(name)(tokens)
    expected = result.last_hidden_state if name == "bert" else result.logits
    assert torch.allclose(session(folder).outputs(tokens), expected, atol=1e-5)


def test_decoding_continues_the_prompt(tmp_path: Path) -> None:
    running = session(models_zoo.write("llama", tmp_path))
    tokens = models_zoo.tokens(samples=2, length=8)
    state = running.prefill(tokens)
    for _ in range(4):
        tokens = torch.cat([tokens, state.tokens[:, None]], dim=1)
        assert torch.equal(state.tokens, running.outputs(tokens[:, :-1])[:, -1].argmax(-1))
        state = running.decode(state)
    assert state.length == 12


def test_precision_is_as_asked(tmp_path: Path) -> None:
    folder = models_zoo.write("llama", tmp_path, dtype=torch.bfloat16)
    assert session(folder, "auto").facts["dtype"] == "bfloat16"
    assert session(folder, "float32").facts["dtype"] == "float32"
    assert session(folder, "auto").outputs(models_zoo.tokens()).dtype == torch.float32


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 32, True), (4, 32, False), (8, None, True)])
def test_a_compressed_model_runs_as_the_library_decompresses_it(
    tmp_path: Path, bits: int, group: int | None, symmetric: bool
) -> None:
    source = models_zoo.write("llama", tmp_path)
    folder = quantized_models.write(source, tmp_path / "after", bits=bits, group=group, symmetric=symmetric)
    running = session(folder)
    assert "dense" in running.facts["runs"]
    assert running.facts["weight_bytes"] == session(source).facts["weight_bytes"]
    tokens = models_zoo.tokens()
    changed = running.outputs(tokens) - session(source).outputs(tokens)
    assert float(changed.abs().max()) > 0


def test_each_layer_keeps_its_own_scheme(tmp_path: Path) -> None:
    """transformers' own dequantization takes the first scheme for all layers; two must both be right."""
    source = models_zoo.write("llama", tmp_path)
    four = quantized_models.write(source, tmp_path / "four", bits=4, group=32)
    eight = quantized_models.write(source, tmp_path / "eight", bits=8, group=None)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    tensors = {k: v for k, v in load_file(four / "model.safetensors").items() if "mlp" not in k}
    tensors |= {k: v for k, v in load_file(eight / "model.safetensors").items() if "mlp" in k}
    save_file(tensors, mixed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((four / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = json.loads((eight / "config.json").read_text())["quantization_config"][
        "config_groups"
    ]["group_0"]
    groups["group_0"]["targets"] = ["re:.*self_attn.*"]
    groups["group_1"]["targets"] = ["re:.*mlp.*"]
    (mixed / "config.json").write_text(json.dumps(config))
    dense = tmp_path / "dense"
    dense.mkdir()
    # The reference: a float model whose parts come from the two models above.
    parts = {
        name: parameter
        for folder, wanted in ((four, False), (eight, True))
        for name, parameter in _parameters(folder).items()
        if ("mlp" in name) == wanted
    }
    save_file(parts, dense / "model.safetensors", metadata={"format": "pt"})
    (dense / "config.json").write_text((source / "config.json").read_text())
    tokens = models_zoo.tokens()
    assert torch.allclose(session(mixed).outputs(tokens), session(dense).outputs(tokens), atol=1e-5)


def _parameters(folder: Path) -> dict[str, torch.Tensor]:
    import transformers
    from transformers import CompressedTensorsConfig

    with pytest.warns(UserWarning, match="You passed"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=CompressedTensorsConfig(dequantize=True)
        )
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_a_missing_weight_is_no_random_weight(tmp_path: Path) -> None:
    folder = models_zoo.write("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"would be random, first: model\.layers\.1\.mlp\.up_proj"):
        session(folder)


def test_a_task_whose_head_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is the task right"):
        session(models_zoo.write("bert", tmp_path), task="text-classification")


def test_other_formats_are_not_available(tmp_path: Path) -> None:
    folder = models_zoo.write("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "quanto"}})
    )
    with pytest.raises(Unavailable, match="'quanto'"):
        session(folder)
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq"}})
    )
    with pytest.raises(Unavailable, match="holds a GPTQ checkpoint"):
        session(folder)


@pytest.mark.parametrize("method", ["bnb_nf4", "bnb_int8"])
def test_models_of_bitsandbytes_run_as_in_transformers(method: str, tmp_path: Path) -> None:
    # As wide as the kernel of bitsandbytes wants on a CPU that multiplies bfloat16.
    model = models_zoo.write("llama", tmp_path, hidden_size=64, intermediate_size=128)
    recipe = {"model": str(model), "device": "cpu", "steps": [{"use": f"quantize.{method}"}]}
    folder = engine.run(recipe, tmp_path / "out", single=True).final
    tokens = models_zoo.tokens(2, 8)
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    assert torch.equal(session(folder).outputs(tokens), expected)


def _rounded_inputs(
    rows: torch.Tensor, options: dict[str, str], tensors: dict[str, torch.Tensor]
) -> torch.Tensor:
    """What a layer multiplies with, written down apart from the library that the runtime uses."""
    form, fixed = options.get("format", "int"), options["activations"] == "static"
    if form == "mxfp4":
        groups = rows.unflatten(-1, (-1, 32))
        fraction, exponent = torch.frexp(groups.abs().amax(-1, keepdim=True))
        scale = torch.ldexp(torch.ones_like(fraction), exponent - 3 + (fraction >= 0.875).int())
        return (from_e2m1(to_e2m1(groups / scale)) * scale).flatten(-2)
    if form == "nvfp4":
        groups, whole = rows.unflatten(-1, (-1, 16)), tensors["input_global_scale"]
        scale = to_e4m3(groups.abs().amax(-1, keepdim=True) / 6 * whole).float() / whole
        return (from_e2m1(to_e2m1(groups / scale)) * scale).flatten(-2)
    # The library's integers reach from -128 to 127, so that its dynamic scale is amax / 127.5.
    largest = rows.abs().amax(-1, keepdim=True) / (127.5 if form == "int" else 448)
    scale = tensors["input_scale"].float() if fixed else largest
    if form == "int":
        return (rows / scale).round().clamp(-128, 127) * scale
    return to_e4m3(rows / scale).float() * scale


@pytest.mark.parametrize(
    "options",
    slow_but(
        [
            {"activations": "dynamic"},
            {"format": "fp8", "activations": "static"},
            {"format": "nvfp4", "activations": "static"},
            {"format": "mxfp4", "activations": "dynamic"},
        ],
        [
            {"activations": "dynamic"},
            {"activations": "static"},
            {"format": "fp8", "activations": "dynamic"},
            {"format": "fp8", "activations": "static"},
            {"format": "nvfp4", "activations": "static"},
            {"format": "mxfp4", "activations": "dynamic"},
        ],
    ),
    ids=lambda options: "-".join(options.values()),
)
def test_inputs_are_rounded_in_front_of_every_layer(options: dict[str, str], tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path, dtype=torch.bfloat16)
    save_file({"input_ids": models_zoo.tokens(8, 16)}, tmp_path / "tokens.safetensors")
    recipe = {
        "model": str(source),
        "device": "cpu",
        "steps": [{"use": "quantize.rtn", **options}],
        "data": {"calibration": str(tmp_path / "tokens.safetensors"), "samples": 8, "sequence_length": 16},
    }
    folder = engine.run(recipe, tmp_path / "out", single=True).final
    running = session(folder)
    assert "inputs rounded" in running.facts["runs"]

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).float()
    stored: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    rounded = 0
    for name, module in model.named_modules():
        local = {
            key.removeprefix(f"{name}."): tensor
            for key, tensor in stored.items()
            if key.startswith(f"{name}.")
        }
        if type(module) is not torch.nn.Linear or "weight_scale" not in local:
            continue
        integers = options.get("format", "int") == "int"
        matrix = read_matrix(local, name) if integers else read_floats(local, name, torch.bfloat16)
        module.weight.data = matrix.dequantize().float()
        module.register_forward_pre_hook(
            lambda _, args, local=local: (_rounded_inputs(args[0], options, local),)
        )
        rounded += 1
    assert rounded == 7 * 3
    tokens = models_zoo.tokens()
    with torch.no_grad():
        expected = model(tokens).logits
    found = running.outputs(tokens)
    # The same numbers in the same order of operations, but for the last bit of a scale here and there,
    # which may move an input to the next number: a thousandth of the largest logit.
    assert float((found - expected).abs().max()) < 1e-3 * float(expected.abs().max())
    with torch.no_grad():
        for module in model.modules():
            module._forward_pre_hooks.clear()
        unrounded = model(tokens).logits
    assert float((found - unrounded).abs().max()) > 1e-3 * float(expected.abs().max())


def test_what_transformers_runs_by_itself_is_the_same(tmp_path: Path) -> None:
    """A user calls ``from_pretrained`` and the model; inputs are rounded there too."""
    source = models_zoo.write("llama", tmp_path)
    recipe = {
        "model": str(source),
        "device": "cpu",
        "steps": [{"use": "quantize.rtn", "format": "fp8", "activations": "dynamic"}],
    }
    folder = engine.run(recipe, tmp_path / "out", single=True).final
    tokens = models_zoo.tokens()
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    assert torch.equal(session(folder).outputs(tokens), expected)


def test_a_configuration_that_drops_the_rounding_of_inputs_is_not_run(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    recipe = {
        "model": str(source),
        "device": "cpu",
        "steps": [{"use": "quantize.rtn", "activations": "dynamic"}],
    }
    folder = engine.run(recipe, tmp_path / "out", single=True).final
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["dequantize"] = True
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unavailable, match="dequantized"):
        session(folder)
