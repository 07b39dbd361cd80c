"""A student that learned nothing is written as it was; one that did is read back as it was meant."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compress.core.artifact import Artifact, Lineage, StepRecord
from compress.core.errors import VerificationError
from compress.core.passes import Meant
from compress.core.run import Run
from compress.sweep.verification import verify_weights
from compress.training.student import Student
from tests import models_zoo
from tests.marks import slow_but


def student(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Artifact, Student]:
    source = Artifact.open(models_zoo.write(name, folder, dtype=dtype))
    return source, Student(source, Run())


def finished(source: Artifact, target: Path, meant: dict[str, Meant]) -> None:
    """Hold what was written against what was meant, as the engine does."""
    lineage = Lineage("source", (StepRecord("distill.logits", {}, "key", "digest"),), meant)
    verify_weights(Artifact.open(target), lineage, Run(), source)


@pytest.mark.parametrize(
    "name",
    slow_but(("llama-tied", "gpt2", "mixtral"), ("llama", "llama-tied", "gpt2", "mixtral", "opt", "gpt-oss")),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_were_not_trained_are_the_same_bytes(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source, trained = student(name, tmp_path, dtype)
    target = tmp_path / "out"
    target.mkdir()
    meant = trained.write(target, lambda *_: None)
    assert not any(entry.changed for entry in meant.values())
    before, after = load_file(source.weight_files[0]), load_file(target / "model.safetensors")
    assert before.keys() == after.keys() == meant.keys()
    assert all(
        torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before
    )
    finished(source, target, meant)


@pytest.mark.parametrize(
    "name",
    slow_but(
        ("llama-tied", "gpt2", "gpt-oss"),
        ("llama", "llama-tied", "gpt2", "mixtral", "opt", "gpt-oss", "gemma3"),
    ),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_weights_load_as_they_were_meant(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source, trained = student(name, tmp_path, dtype)
    assert all(weight.dtype == torch.float32 for weight in trained.model.parameters())
    assert all(weight.requires_grad for weight in trained.model.parameters())
    with torch.no_grad():
        for weight in trained.model.parameters():
            weight.mul_(1.25)
    target = tmp_path / "out"
    target.mkdir()
    meant = trained.write(target, lambda *_: None)
    # A bias of nothing stays nothing.
    assert sum(entry.changed for entry in meant.values()) >= 0.6 * len(meant)
    assert {entry.error for entry in meant.values()} <= {0.0, 0.25} or dtype == torch.bfloat16
    finished(source, target, meant)
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert loaded.dtype == dtype
    wanted = dict(trained.model.named_parameters())
    for key, weight in loaded.named_parameters():
        assert torch.equal(weight, wanted[key].to(dtype)), key
    if name == "llama-tied":
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_weight_that_is_not_what_was_meant_is_found(tmp_path: Path) -> None:
    source, trained = student("llama", tmp_path)
    with torch.no_grad():
        trained.model.lm_head.weight.mul_(2.0)
    target = tmp_path / "out"
    target.mkdir()
    meant = trained.write(target, lambda *_: None)
    trained.reload()
    (tmp_path / "other").mkdir()
    trained.write(tmp_path / "other", lambda *_: None)
    with pytest.raises(VerificationError, match="lm_head"):
        finished(source, tmp_path / "other", meant)


def test_shards_stay_shards_and_everything_else_travels_along(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    models_zoo.build("llama").save_pretrained(folder, max_shard_size="40KB")
    (folder / "README.md").write_text("card")
    (folder / "extra").mkdir()
    (folder / "extra" / "words.txt").write_text("words")
    source = Artifact.open(folder)
    trained = Student(source, Run())
    with torch.no_grad():
        trained.model.model.norm.weight.add_(1.0)
    target = tmp_path / "out"
    target.mkdir()
    meant = trained.write(target, lambda *_: None)
    assert [name for name, entry in meant.items() if entry.changed] == ["model.norm.weight"]
    maps = [
        json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
        for path in (folder, target)
    ]
    assert maps[0] == maps[1]
    assert len(set(maps[0].values())) > 2
    for file in ("config.json", "generation_config.json", "README.md", "extra/words.txt"):
        assert (target / file).read_bytes() == (folder / file).read_bytes()
    finished(source, target, meant)
