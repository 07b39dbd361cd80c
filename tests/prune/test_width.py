"""Width pruning on ten architectures: the files hold the model with the removed channels at zero."""

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from compress import engine
from compress.core.artifact import LAYERS_FILE, Artifact
from compress.core.errors import CalibrationError, PlanError, VerificationError
from compress.core.run import CalibrationSource, Run
from compress.models.channels import Channels
from compress.prune.width import Width
from compress.sweep import narrowing
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
    numbers,
    outputs,
    recipe_of,
    tensors,
)

prune = partial(applied, "prune.width")

# Which of them can say that they have fewer heads of the same width, found by nobody but the classes.
LOSE_HEADS = ("llama", "qwen3", "mistral", "gemma2", "phi", "phi3")
KEEP_HEADS = ("gpt2", "opt", "gpt-neox", "bert", "distilbert", "modernbert")


def without(model: Any, layers: dict[str, Any]) -> Any:
    """The big model with the channels and heads that went at zero in front of the layers that read them."""
    for name, row in layers.items():
        module = model.get_submodule(name)
        wide = module.weight.shape[0] if type(module).__name__ == "Conv1D" else module.weight.shape[1]
        width = wide // row["parts"]
        mask = torch.zeros(row["parts"], width)
        mask[numbers(row["kept"])] = 1
        flat = mask.flatten()
        module.register_forward_pre_hook(lambda _, args, mask=flat: (args[0] * mask,))
    return model


@pytest.mark.parametrize(
    "name",
    slow_but(
        ("llama", "gemma2", "gpt2", "bert", "albert"),
        [*LOSE_HEADS, *KEEP_HEADS, "albert", "qwen2-sliding", "gemma3"],
    ),
)
def test_it_computes_what_the_big_model_does_without_its_channels(name: str, tmp_path: Path) -> None:
    source, recorder = models_zoo.write(name, tmp_path), Recorder()
    out = prune(source, tmp_path / "out", recorder, keep=0.5)
    said = decisions(out)
    assert said["shape"]["mlp"]["got"] * 2 == said["shape"]["mlp"]["of"]
    small, big = loaded(out.path), loaded(source)
    check_counts(out, source)
    check_heads(name, out, small.config, recorder.messages)
    whole = outputs(big)
    expected = outputs(without(big, said["layers"]))
    assert float((outputs(small) - expected).abs().max()) <= 1e-5
    # Something went, so the model as it was says something else.
    assert float((whole - expected).abs().max()) > 1e-3


def check_heads(name: str, out: Artifact, config: Any, messages: list[str]) -> None:
    """Heads go in whole groups where the class can say so; where it cannot, they stay with a reason."""
    heads = decisions(out)["shape"]["heads"]
    assert (heads["of"], heads["asked"]) == (4, 2)
    assert any("heads: asked for 2 of 4" in message for message in messages)
    if name in LOSE_HEADS:
        assert heads["got"] == 2
        assert heads["key_value_got"] * 2 == heads["key_value_of"]
        assert config.num_attention_heads == heads["got"]
        assert config.num_key_value_heads == heads["key_value_got"]
    if name in KEEP_HEADS:
        assert heads["got"] == 4
        assert config.num_attention_heads == 4
        assert "no field of the configuration class" in heads["note"]


@pytest.mark.parametrize("name", KEEP_HEADS)
def test_heads_asked_for_by_name_are_refused_where_they_must_stay(name: str, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write(name, tmp_path))
    save = calibration(tmp_path)
    run = Run(calibration=CalibrationSource(save["calibration"]))
    with pytest.raises(PlanError, match="2 of 4 query heads cannot be kept"):
        Width(heads=0.5).check(source, run)


def check_counts(out: Artifact, source: Path) -> None:
    """What is said of the shape, the layers and the parameters is what lies in the files."""
    said = decisions(out)
    before, after = tensors(source), tensors(out.path)
    assert before.keys() == after.keys()
    assert said["parameters"]["before"] == sum(tensor.numel() for tensor in before.values())
    assert said["parameters"]["after"] == sum(tensor.numel() for tensor in after.values())
    for name, row in said["layers"].items():
        weight = next(tensor for key, tensor in after.items() if key.endswith(f"{name}.weight"))
        wide = next(tensor for key, tensor in before.items() if key.endswith(f"{name}.weight"))
        dimension = next(d for d in (0, 1) if weight.shape[d] != wide.shape[d])
        assert weight.shape[dimension] == row["columns"]
        assert weight.shape[1 - dimension] == row["rows"]
        assert row["kept_parts"] == len(numbers(row["kept"])) == said["shape"][row["kind"]]["got"]
        # A block that a model runs again and again sees every token as often.
        assert row["tokens"] in (SAMPLES * LENGTH, 3 * SAMPLES * LENGTH)
    assert out.lineage is not None
    changed = {name for name, meant in out.lineage.tensors.items() if meant.changed}
    assert changed == {name for name in after if after[name].shape != before[name].shape}
    assert len(changed) == said["changed"]
    with (out.path / LAYERS_FILE).open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["layer"]: row["kept"] for row in rows} == {k: v["kept"] for k, v in said["layers"].items()}


def test_query_heads_go_evenly_from_every_group_where_that_is_nearer(tmp_path: Path) -> None:
    source = models_zoo.write("qwen3-eight", tmp_path)
    out = prune(source, tmp_path / "out", mlp=1.0, heads=0.75)
    said = decisions(out)
    assert said["shape"] == {"heads": {"of": 8, "asked": 6, "got": 6, "key_value_of": 2, "key_value_got": 2}}
    assert said["config"] == {"num_attention_heads": 6}
    for row in said["layers"].values():
        assert sorted(number // 4 for number in numbers(row["kept"])) == [0, 0, 0, 1, 1, 1]
    expected = outputs(without(loaded(source), said["layers"]))
    assert float((outputs(loaded(out.path)) - expected).abs().max()) <= 1e-5


def test_the_class_decides_which_number_of_heads_is_nearest(tmp_path: Path) -> None:
    # Llama wants heads that divide the hidden size, so six of eight are refused where the size is 32.
    source = models_zoo.configuration("llama")
    source.num_attention_heads, source.head_dim = 8, 4
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(source).save_pretrained(tmp_path / "llama")
    out = prune(tmp_path / "llama", tmp_path / "out", keep=0.6)
    heads = decisions(out)["shape"]["heads"]
    assert (heads["asked"], heads["got"], heads["key_value_got"]) == (5, 4, 1)
    assert "hidden size" in heads["note"]


def test_the_multiple_rounds_the_channels(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    out = prune(source, tmp_path / "out", mlp=0.7, heads=1.0, multiple=16)
    shape = decisions(out)["shape"]["mlp"]
    assert shape == {
        "of": 64,
        "asked": 45,
        "got": 48,
        "multiple": 16,
        "note": "48 is the nearest multiple of 16 to 45",
    }
    assert loaded(out.path).config.intermediate_size == 48


def test_importance_is_the_mean_activation_in_the_root_of_squares_over_sequences(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    out = prune(source, tmp_path / "out", keep=0.5)
    model = loaded(source)
    seen: dict[str, torch.Tensor] = {}
    rows = decisions(out)["layers"]
    for name in rows:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0])
        )
    with torch.no_grad():
        model(input_ids=models_zoo.tokens(SAMPLES, LENGTH))
    for name, row in rows.items():
        parts = seen[name].unflatten(-1, (row["parts"], -1)).norm(dim=-1)
        importance = parts.mean(1).norm(dim=0)
        if row["kind"] == "heads":
            best = int(importance.view(2, 2).square().sum(1).argmax())
            assert numbers(row["kept"]) == [2 * best, 2 * best + 1]
        else:
            assert numbers(row["kept"]) == sorted(importance.topk(row["kept_parts"]).indices.tolist())


def test_what_stays_is_the_same_to_the_bit_in_half_precision(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path, dtype=torch.bfloat16)
    out = prune(source, tmp_path / "out", keep=0.5)
    before, after = tensors(source), tensors(out.path)
    row = decisions(out)["layers"]["model.layers.1.mlp.down_proj"]
    columns = numbers(row["kept"])
    assert after["model.layers.1.mlp.down_proj.weight"].dtype == torch.bfloat16
    assert torch.equal(
        after["model.layers.1.mlp.down_proj.weight"],
        before["model.layers.1.mlp.down_proj.weight"][:, columns],
    )
    assert torch.equal(
        after["model.layers.1.mlp.up_proj.weight"], before["model.layers.1.mlp.up_proj.weight"][columns]
    )
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def test_the_seed_does_not_matter_for_given_tokens_and_ties_go_to_the_lower_index(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    with safe_open(source / "model.safetensors", framework="pt") as handle:
        stored = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    for name in stored:
        if "gate_proj" in name or "up_proj" in name:
            stored[name] = stored[name][:1].expand_as(stored[name]).contiguous()
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    first = prune(source, tmp_path / "a" / "out", mlp=0.5, heads=1.0)
    second = prune(source, tmp_path / "b" / "out", mlp=0.5, heads=1.0, around={"seed": 5})
    assert {row["kept"] for row in decisions(first)["layers"].values()} == {"0-31"}
    assert first.digest == second.digest


@pytest.mark.parametrize(
    ("event", "number"),
    slow_but(
        [("block.calibrate", 2), ("shard.tensor", 14)],
        [("block.calibrate", 2), ("shard.tensor", 14), ("block.finish", 2), ("artifact.rename", 1)],
    ),
)
def test_a_run_that_is_killed_resumes_to_the_same_bytes(event: str, number: int, tmp_path: Path) -> None:
    source = models_zoo.write("qwen3", tmp_path)
    recipe = recipe_of("prune.width", source, tmp_path, keep=0.5)
    again = killed_and_resumed(recipe, tmp_path, event, number)
    # Blocks that were finished are not calibrated again.
    assert again.count("block.resume") > 0
    assert again.count("block.resume") + again.count("block.start") == 4


def test_experts_are_refused_and_heads_alone_are_pruned(tmp_path: Path) -> None:
    source = models_zoo.write("mixtral", tmp_path)
    with pytest.raises(PlanError, match="holds all experts in one tensor"):
        prune(source, tmp_path / "out")
    out = prune(source, tmp_path / "out", mlp=1.0, heads=0.5)
    said = decisions(out)
    assert list(said["shape"]) == ["heads"]
    expected = outputs(without(loaded(source), said["layers"]))
    assert float((outputs(loaded(out.path)) - expected).abs().max()) <= 1e-5


def test_nothing_to_take_out_is_refused(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    with pytest.raises(PlanError, match="nothing would be taken out"):
        prune(source, tmp_path / "out", keep=1.0)
    with pytest.raises(PlanError, match="45 of 64 channels of an MLP cannot be kept: no multiple of 100"):
        prune(source, tmp_path / "out", mlp=0.7, multiple=100)


def test_calibration_text_is_needed(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    with pytest.raises(PlanError, match="needs calibration text"):
        Width().check(source, Run())


def test_inputs_that_are_not_finite_are_an_error_that_names_the_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = models_zoo.write("llama", tmp_path)
    importance = narrowing.PartImportance.add
    monkeypatch.setattr(
        narrowing.PartImportance, "add", lambda self, rows: importance(self, rows * float("inf"))
    )
    with pytest.raises(CalibrationError, match=r"model\.layers\.0\..*NaN or infinite"):
        prune(source, tmp_path / "out")


def test_a_wrong_cut_is_caught_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models_zoo.write("llama", tmp_path)
    cuts_of = narrowing.cuts_of

    def shifted(model: Any, entry: Channels, staying: Any) -> Any:
        cuts = cuts_of(model, entry, staying)
        wrong = next(cut for cut in cuts if "up_proj" in cut.parameter or "q_proj" in cut.parameter)
        wrong.places[0].copy_(wrong.places[0].roll(1))
        return cuts

    monkeypatch.setattr(narrowing, "cuts_of", shifted)
    with pytest.raises(VerificationError, match="away from itself with the same channels at zero"):
        prune(source, tmp_path / "out", keep=0.5)


def test_it_may_be_pruned_again_and_rounded(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    recipe = recipe_of("prune.width", source, tmp_path, keep=0.75)
    recipe["steps"] += [
        {"use": "prune.width", "mlp": 0.67, "heads": 0.5},
        {"use": "quantize.rtn", "group_size": 16},
    ]
    result = engine.run(recipe, tmp_path / "out")
    config = json.loads((result.final / "config.json").read_text())
    assert (config["intermediate_size"], config["num_attention_heads"]) == (32, 2)


@pytest.mark.slow
def test_the_least_active_channels_are_the_ones_to_lose(shared: Path, tmp_path: Path) -> None:
    text = {"calibration": str(shared / "data" / "gutenberg_train.txt.gz"), "samples": 16}
    recipe = {
        "model": str(shared / "models" / "gutenberg-4m"),
        "steps": [{"use": "prune.width", "keep": 0.75}],
        "data": {**text, "sequence_length": 256},
        "threads": 1,
        "device": "cpu",
    }
    out = Artifact.open(engine.run(recipe, tmp_path / "out", single=True).final)
    layers = decisions(out)["layers"]
    folder = shared / "models" / "gutenberg-4m"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = (shared / "data" / "wikitext2_valid.txt").read_text(encoding="utf-8")[:40_000]
    tokens = torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"][:4096]).view(-1, 256)

    def loss(model: Any) -> float:
        with torch.no_grad():
            return float(model.float()(input_ids=tokens, labels=tokens).loss)

    generator = torch.Generator().manual_seed(0)
    at_random = {
        name: {
            **row,
            "kept": " ".join(
                str(int(number))
                for number in torch.randperm(row["parts"], generator=generator)[: row["kept_parts"]]
            ),
        }
        for name, row in layers.items()
    }
    whole, pruned = loss(loaded(folder)), loss(loaded(out.path))
    damaged = loss(without(loaded(folder), at_random))
    assert whole < pruned < whole + 0.5 * (damaged - whole)
