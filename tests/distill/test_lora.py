"""Adapters: what peft computes with them is what is trained, merged, rounded or saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compress import engine
from compress.core.artifact import ADAPTER_FOLDER, RUN_FILE, Artifact, Lineage
from compress.core.errors import EnvironmentFault, PlanError
from compress.core.recipe import Recipe
from tests import models_zoo, packed_models, quantized_models, teacher_and_student
from tests.single_steps import tensors

pytest.importorskip("peft", reason="adapters need the extra compress-models[peft]")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, its integers and a teacher, over one vocabulary of characters."""
    folder = tmp_path_factory.mktemp("place")
    packed_models.floats("llama", folder / "student")
    packed_models.floats("llama", folder / "teacher", num_hidden_layers=3)
    for name in ("student", "teacher"):
        quantized_models.add_tokenizer(folder / name, models_zoo.VOCABULARY)
    packed_models.integers(folder / "student", folder / "integers", bits=4)
    teacher_and_student.write_text(folder)
    return folder


def recipe(place: Path, student: str = "student", **options: Any) -> Recipe:
    step = {
        "use": "distill.lora",
        "teacher": str(place / "teacher"),
        "tokens": 1_280,
        "window": 16,
        "batch": 4,
    }
    step |= {"learning_rate": 2e-2, "evaluation_tokens": 128, "precision": "float32", "rank": 4, **options}
    return Recipe.of(
        {
            "model": str(place / student),
            "threads": 1,
            "device": "cpu",
            "data": {"train": str(place / "text.txt")},
            "steps": [step],
        }
    )


def decisions(folder: Path) -> Any:
    lineage = Lineage.read(folder)
    assert lineage is not None
    return lineage.steps[-1].decisions


def test_merged_adapters_are_an_ordinary_checkpoint(place: Path, tmp_path: Path) -> None:
    engine.run(recipe(place), tmp_path / "out", single=True)
    told = decisions(tmp_path / "out")
    assert told["adapters"] == 14
    assert told["changed"] == 14
    found = told["validation"]
    assert found["best"]["divergence"] < 0.9 * found["before"]["divergence"]
    # Adding them is exact but for the arithmetic of sums.
    merging = told["merging"]
    assert merging["before"]["loss"] == pytest.approx(found["best"]["loss"], rel=1e-5)
    assert merging["after"]["loss"] == pytest.approx(merging["before"]["loss"], rel=1e-3)
    before, after = (load_file(path / "model.safetensors") for path in (place / "student", tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        apart = (after[name].float() - weight.float()).nonzero().numel() > 0
        assert apart == ("_proj" in name), name
    engine.verify(tmp_path / "out")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_saved_adapters_are_those_of_peft_beside_the_model_to_the_byte(place: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    for name in ("out", "again"):
        engine.run(recipe(place, result="adapter"), tmp_path / name, single=True)
    engine.run(recipe(place), tmp_path / "merged", single=True)
    out = tmp_path / "out"
    for file in sorted(out.rglob("*")):
        if file.is_file() and file.name != RUN_FILE:
            assert file.read_bytes() == (tmp_path / "again" / file.relative_to(out)).read_bytes(), file
    weights = "model.safetensors"
    assert load_file(out / weights).keys() == load_file(place / "student" / weights).keys()
    assert decisions(out)["changed"] == 0
    base = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = models_zoo.tokens(2, 16)
    with torch.no_grad():
        bare = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, out / ADAPTER_FOLDER)(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(tokens).logits
    assert float((adapted - merged).norm()) < 0.1 * float((adapted - bare).norm())
    said = json.loads((out / ADAPTER_FOLDER / "adapter_config.json").read_text())
    assert said["r"] == 4
    assert said["lora_alpha"] == 8
    assert "q_proj" in said["target_modules"]
    # They belong to these weights: what comes next does not take them along.
    artifact = Artifact.open(out)
    travelling = [path.relative_to(out).parts[0] for path in [*artifact.companions, *artifact.weight_files]]
    assert ADAPTER_FOLDER not in travelling
    assert artifact.digest != Artifact.open(place / "student").digest


def test_adapters_on_integers_are_rounded_onto_their_grid(place: Path, tmp_path: Path) -> None:
    engine.run(recipe(place, "integers"), tmp_path / "out", single=True)
    told = decisions(tmp_path / "out")
    merging = told["merging"]
    assert merging["before"]["loss"] < told["validation"]["before"]["loss"]
    assert merging["after"]["loss"] > merging["before"]["loss"]
    assert told["changed"] > 0
    before, after = (load_file(path / "model.safetensors") for path in (place / "integers", tmp_path / "out"))
    differing = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert differing == {"weight_packed"}
    engine.verify(tmp_path / "out")


def test_zeros_of_pruning_stay(place: Path, tmp_path: Path) -> None:
    pruned = Recipe.of(
        {
            "model": str(place / "student"),
            "threads": 1,
            "device": "cpu",
            "data": {"calibration": str(place / "text.txt"), "samples": 8, "sequence_length": 16},
            "steps": [{"use": "prune.wanda", "sparsity": 0.5}],
        }
    )
    engine.run(pruned, tmp_path / "pruned", single=True)
    made = recipe(place).model_copy(update={"model": str(tmp_path / "pruned")})
    engine.run(made, tmp_path / "out", single=True)
    name = "model.layers.0.mlp.up_proj.weight"
    before, after = (tensors(tmp_path / each)[name] for each in ("pruned", "out"))
    assert torch.equal(before == 0, after == 0)
    assert not torch.equal(before, after)
    assert decisions(tmp_path / "out")["zeros_kept"] > 0


def test_what_says_nothing_is_refused(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**options: Any) -> str:
        with pytest.raises(PlanError) as caught:
            engine.plan(recipe(place, **options), tmp_path / "out", single=True)
        return f"{caught.value.message} {caught.value.hint}"

    assert "matches *.nothing" in refused(targets=["*.nothing"])
    assert "model.layers.0.self_attn.q_proj" in refused(targets=["*.nothing"])
    assert "rank 48" in refused(rank=48)
    assert "scales" in refused(student="integers", scales="train")
    from compress.training import adapters

    monkeypatch.setattr(adapters, "find_spec", lambda _: None)
    with pytest.raises(EnvironmentFault) as caught:
        engine.plan(recipe(place), tmp_path / "out", single=True)
    assert "compress-models[peft]" in caught.value.hint
