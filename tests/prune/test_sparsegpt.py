"""SparseGPT on whole models: against the same steps in plain forward passes, and what follows it."""

import csv
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress import engine
from compress.core.artifact import LAYERS_FILE, Artifact
from compress.core.errors import CalibrationError, ModelError, PlanError
from compress.core.run import Run
from compress.numerics.hessian import Hessian
from compress.numerics.masks import ColumnNorms
from compress.numerics.sparsification import sparsify
from compress.prune.sparsegpt import SparseGpt
from compress.sweep.zeros import Zeros
from tests import models_zoo
from tests.single_steps import LENGTH, applied, changed, decisions, killed_and_resumed, recipe_of, tensors

SAMPLES = 8
"""With fewer the smallest differences of sums decide which weights go."""
prune = partial(applied, "prune.sparsegpt", samples=SAMPLES)
SLOW = pytest.mark.slow
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def in_memory(model: Any, **options: Any) -> None:
    """All weights in memory, one whole forward pass for each stage of each block."""
    for block in model.model.layers:
        for stage in STAGES:
            modules = [block.get_submodule(name) for name in stage]
            seen: list[torch.Tensor] = []
            handle = modules[0].register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0].reshape(-1, args[0].shape[-1]))
            )
            with torch.no_grad():
                model(input_ids=models_zoo.tokens(SAMPLES, LENGTH))
            handle.remove()
            hessian = Hessian(seen[0].shape[1])
            hessian.add(seen[0])
            for module in modules:
                found = sparsify(module.weight.detach().clone(), hessian, **options)
                module.weight.data.copy_(found.weight)


@pytest.mark.parametrize(
    ("options", "same"),
    [
        pytest.param({"refinement": 0}, {"sparsity": 0.5, "damping": 0.01}, marks=SLOW),
        pytest.param(
            {"sparsity": 0.3, "refinement": 4}, {"sparsity": 0.3, "damping": 0.01, "steps": 4}, marks=SLOW
        ),
        ({"pattern": "2:4"}, {"pattern": (2, 4), "damping": 0.01, "steps": 16}),
        pytest.param(
            {"block_size": 8, "damping": 0.1, "refinement": 2},
            {"sparsity": 0.5, "block": 8, "damping": 0.1, "steps": 2},
            marks=SLOW,
        ),
    ],
)
def test_it_does_what_plain_forward_passes_would(
    options: dict[str, Any], same: dict[str, Any], tmp_path: Path
) -> None:
    source = models_zoo.write("llama", tmp_path)
    out = prune(source, tmp_path / "out", **options)
    expected = models_zoo.build("llama")
    in_memory(expected, **same)
    ours = transformers.LlamaForCausalLM.from_pretrained(out.path).state_dict()
    wanted = expected.state_dict()
    for name in STAGES[0]:
        # What the very first stage sees is the same; further on, sums of another order may move a near tie.
        first = f"model.layers.0.{name}.weight"
        assert torch.equal(ours[first] == 0, wanted[first] == 0)
        torch.testing.assert_close(ours[first], wanted[first], rtol=1e-3, atol=1e-4)
    alike = total = 0
    for name, weight in wanted.items():
        alike += int(((ours[name] == 0) == (weight == 0)).sum())
        total += weight.numel()
    assert alike / total > 0.99


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float32),
        ("gpt2", torch.float32),
        ("mixtral", torch.bfloat16),
        *[pytest.param(name, torch.float32, marks=SLOW) for name in ("opt", "bert", "qwen2-moe", "phi")],
        *[pytest.param(name, torch.bfloat16, marks=SLOW) for name in ("llama", "gpt2")],
        pytest.param("llama", torch.float16, marks=SLOW),
    ],
)
def test_zeros_are_counted_in_the_files(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = models_zoo.write(name, tmp_path, dtype=dtype)
    out = prune(source, tmp_path / "out", pattern="2:4")
    before, after = tensors(source), tensors(out.path)
    assert before.keys() == after.keys()
    pruned = changed(out)
    for key, tensor in after.items():
        assert (tensor.dtype, tensor.shape) == (before[key].dtype, before[key].shape)
        if key not in pruned:
            assert torch.equal(tensor, before[key]), key
            continue
        rows = tensor.T if name == "gpt2" else tensor
        assert bool(((rows.unflatten(-1, (-1, 4)) != 0).sum(-1) == 2).all()), key
        # What stays has moved.
        assert not torch.equal(torch.where(tensor == 0, tensor, before[key]), tensor), key
    said = decisions(out)
    assert said["zeros"] * 2 == said["weights"] == sum(tensor.numel() for tensor in pruned.values())
    assert said["sparsity"] == 0.5
    with (out.path / LAYERS_FILE).open(encoding="utf-8", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert sum(int(row["zeros"]) for row in table) == said["zeros"]
    assert {row["scheme"] for row in table} == {"2:4"}
    assert all(0 <= float(row["output_error"]) < 1 for row in table)
    assert all(float(row["damping"]) >= 0.01 for row in table)


def test_every_matrix_by_itself_loses_its_share(tmp_path: Path) -> None:
    source = models_zoo.write("mixtral", tmp_path)
    out = prune(source, tmp_path / "out", sparsity=0.3)
    pruned = changed(out)
    assert len([key for key in pruned if ".experts." in key]) == 3 * 4 * 3
    # Two pieces on disk may be one matrix, whose rows share its zeros out among them.
    for row in decisions(out)["layers"].values():
        count = int(row["rows"]) * int(row["columns"])
        assert int(row["zeros"]) == int(0.3 * count + 1e-6)
        assert row["scheme"] == "0.3 of the matrix"
    assert decisions(out)["zeros"] == sum(int((tensor == 0).sum()) for tensor in pruned.values())


@pytest.mark.parametrize("options", [{"pattern": "2:4"}, pytest.param({"sparsity": 0.6}, marks=SLOW)])
@pytest.mark.parametrize(
    ("method", "rounding"),
    [
        ("gptq", {}),
        pytest.param("gptq", {"symmetric": False}, marks=SLOW),
        pytest.param("gptq", {"bits": 8, "refinement": 0}, marks=SLOW),
        ("autoround", {"bits": 2, "iterations": 8, "rate": 0.1}),
        pytest.param("autoround", {"symmetric": False, "iterations": 8, "rate": 0.1}, marks=SLOW),
        pytest.param("autoround", {"iterations": 8, "start": "nearest", "descent": "scaled"}, marks=SLOW),
    ],
)
def test_zeros_survive_rounding(
    method: str, options: dict[str, Any], rounding: dict[str, Any], tmp_path: Path
) -> None:
    source = models_zoo.write("llama", tmp_path)
    pruned = prune(source, tmp_path / "pruned", **options)
    rounded = applied(f"quantize.{method}", pruned.path, tmp_path / "rounded", group_size=16, **rounding)
    model = transformers.LlamaForCausalLM.from_pretrained(rounded.path)
    with torch.no_grad():
        # Its first forward pass makes it dense.
        model(input_ids=models_zoo.tokens(1, 4))
    values = model.state_dict()
    for name, weight in changed(pruned).items():
        assert bool((values[name][weight == 0] == 0).all()), name
        assert not torch.equal(values[name], weight)


@SLOW
def test_values_are_those_that_the_file_can_hold(tmp_path: Path) -> None:
    # Loaded in bfloat16 from a file in float32, and in float32 from a file in bfloat16.
    for on_disk, loaded in ((torch.float32, "bfloat16"), (torch.bfloat16, "float32")):
        source = models_zoo.write("llama", tmp_path / loaded, dtype=on_disk)
        config = source / "config.json"
        text = config.read_text(encoding="utf-8")
        written = str(on_disk).removeprefix("torch.")
        assert f'"{written}"' in text
        config.write_text(text.replace(f'"{written}"', f'"{loaded}"'), encoding="utf-8")
        out = prune(source, tmp_path / loaded / "out", sparsity=0.5)
        assert {tensor.dtype for tensor in changed(out).values()} == {on_disk}


def test_what_cannot_be_pruned_is_refused(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    with pytest.raises(PlanError, match="needs calibration text"):
        SparseGpt().check(Artifact.open(source), Run())
    with pytest.raises(PlanError, match="runs of 7 do not divide"):
        prune(source, tmp_path / "out", pattern="3:7")
    for statistic, got in ((None, "nothing"), (ColumnNorms(4), "ColumnNorms")):
        with pytest.raises(CalibrationError, match=f"needs the second moments.*got {got}"):
            SparseGpt().prune(torch.ones(2, 4), statistic, Zeros(0.5))


def test_weights_that_move_out_of_range_are_refused_before_they_are_written(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path, dtype=torch.float16)
    weights = load_file(source / "model.safetensors")
    # Each is just below the largest float16, so one that makes up for another gets beyond it.
    weights["model.layers.2.mlp.down_proj.weight"].sign_().mul_(65_000)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="NaN, infinite or too large for float16"):
        prune(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_killed_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    recipe = recipe_of("prune.sparsegpt", source, tmp_path, ratios="outliers", outlier_factor=2.0)
    again = killed_and_resumed(recipe, tmp_path, "layer.solve", 9)
    assert again.count("block.resume") == 1


@SLOW
@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_it_loses_less_than_leaving_the_others_alone(
    options: dict[str, Any], shared: Path, tmp_path: Path
) -> None:
    folder = shared / "models" / "gutenberg-4m"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = (shared / "data" / "wikitext2_valid.txt").read_text(encoding="utf-8")[:40_000]
    tokens = torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"][:4096]).view(-1, 256)

    def loss(path: Path) -> float:
        with torch.no_grad():
            model = transformers.LlamaForCausalLM.from_pretrained(path).float()
            return float(model(input_ids=tokens, labels=tokens).loss)

    losses: dict[str, float] = {}
    for use, more in (
        ("prune.magnitude", {}),
        ("prune.wanda", {}),
        ("prune.sparsegpt", {"refinement": 0}),
        ("prune.sparsegpt", {}),
    ):
        recipe = {
            "model": str(folder),
            "steps": [{"use": use, **options, **more}],
            "data": {
                "calibration": str(shared / "data" / "gutenberg_train.txt.gz"),
                "samples": 64,
                "sequence_length": 256,
            },
            "threads": 1,
            "device": "cpu",
        }
        out = tmp_path / f"{use}-{len(losses)}"
        losses[f"{use} {more}"] = loss(engine.run(recipe, out, single=True).final)
    magnitude, wanda, plain, refined = losses.values()
    assert loss(folder) < refined < wanda < magnitude
    assert plain < wanda
    assert refined < plain * 1.01
