"""Bits under a budget: what is chosen keeps to it, is what is written, and loads."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file

from compress import engine
from compress.core.artifact import Artifact
from compress.core.budget import Budget
from compress.core.errors import PlanError, UsageError
from compress.core.identity import step_key
from compress.quantize.auto import Auto
from tests import models_zoo


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("text") / "tokens.safetensors"
    save_file({"input_ids": models_zoo.tokens(8, 12)}, file)
    return {"device": "cpu", "data": {"calibration": str(file), "samples": 8, "sequence_length": 12}}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models_zoo.write("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(
    recipe: dict[str, Any], llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Artifact, dict[str, Any]]:
    """The model under a budget of 3.7 bits, and what was decided."""
    return made(recipe, llama, tmp_path_factory.mktemp("whole") / "out", bits_per_weight=3.7)


def made(recipe: dict[str, Any], model: Path, out: Path, **options: Any) -> tuple[Artifact, dict[str, Any]]:
    """The artifact and what was decided."""
    options = {"group_size": 16, "rounder": "rtn", **options}
    whole = {**recipe, "model": str(model), "steps": [{"use": "quantize.auto", **options}]}
    artifact = Artifact.open(engine.run(whole, out, single=True).final)
    assert artifact.lineage is not None
    return artifact, dict(artifact.lineage.steps[-1].decisions)


def bits_on_disk(artifact: Artifact) -> dict[str, int]:
    """Bits of every packed matrix, from the sizes of its tensors."""
    found = {}
    for file in artifact.weight_files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                if name.endswith(".weight_packed"):
                    stem = name.removesuffix("_packed")
                    columns = int(tensors.get_tensor(f"{stem}_shape")[1])
                    found[stem.removesuffix(".weight")] = 32 * tensors.get_tensor(name).shape[1] // columns
    return found


def check_average(budget: float, artifact: Artifact, decided: dict[str, Any]) -> None:
    assert budget - 0.3 < decided["bits_per_weight"] <= budget
    on_disk = bits_on_disk(artifact)
    chosen = {name: part["bits"] for names, part in decided["parts"].items() for name in names.split()}
    assert on_disk == chosen
    assert len(set(chosen.values())) > 1
    with torch.no_grad():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(artifact.path)
        assert torch.isfinite(loaded(input_ids=models_zoo.tokens(1, 8)).logits).all()


def test_an_average_of_bits_is_kept_and_used(whole: tuple[Artifact, dict[str, Any]]) -> None:
    check_average(3.7, *whole)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [3.0, 4.5])
def test_other_averages_are_kept_too(
    budget: float, recipe: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    check_average(budget, *made(recipe, llama, tmp_path / "out", bits_per_weight=budget))


def test_bits_go_where_they_are_worth_most(recipe: dict[str, Any], tmp_path: Path) -> None:
    _, decided = made(recipe, models_zoo.write("llama", tmp_path), tmp_path / "out", bits_per_weight=4.0)
    uniform = sum(part["divergence"]["4"] for part in decided["parts"].values())
    assert decided["predicted_divergence"] <= uniform
    total = sum(part["divergence"][str(part["bits"])] for part in decided["parts"].values())
    assert decided["predicted_divergence"] == pytest.approx(total, rel=1e-4)


def test_a_size_holds_for_the_tensors_on_disk(recipe: dict[str, Any], tmp_path: Path) -> None:
    model = models_zoo.write("llama", tmp_path, dtype=torch.bfloat16)
    limit = 26_000
    artifact, decided = made(recipe, model, tmp_path / "out", size=f"{limit}B")
    taken = 0
    for file in artifact.weight_files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                tensor = tensors.get_tensor(name)
                taken += tensor.numel() * tensor.element_size()
    assert limit * 0.95 < taken <= limit
    assert decided["bits_per_weight"] > 2


@pytest.mark.slow
def test_a_divergence_is_not_exceeded_and_costs_as_little_as_it_can(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    model = models_zoo.write("llama", tmp_path)
    _, loose = made(recipe, model, tmp_path / "loose", max_kl=0.3)
    _, tight = made(recipe, model, tmp_path / "tight", max_kl=0.01)
    assert loose["predicted_divergence"] <= 0.3
    assert tight["predicted_divergence"] <= 0.01
    assert tight["bits_per_weight"] > loose["bits_per_weight"]
    with pytest.raises(PlanError, match=r"best that 8 bits can do .* budget is 1e-09 nats"):
        made(recipe, model, tmp_path / "none", max_kl=1e-9)


@pytest.mark.slow
def test_experts_have_one_number_of_bits(recipe: dict[str, Any], tmp_path: Path) -> None:
    artifact, decided = made(
        recipe, models_zoo.write("mixtral", tmp_path), tmp_path / "out", bits_per_weight=4.4
    )
    experts = {bits for name, bits in bits_on_disk(artifact).items() if ".experts." in name}
    assert len(experts) == 1
    assert decided["bits_per_weight"] <= 4.4
    assert engine.verify(artifact.path).weights is not None


def test_an_interrupted_run_measures_nothing_twice(
    recipe: dict[str, Any],
    llama: Path,
    whole: tuple[Artifact, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the power is gone")

    with monkeypatch.context() as patched:
        patched.setattr("compress.sweep.quantization.quantize", broken)
        with pytest.raises(RuntimeError, match="power"):
            made(recipe, llama, tmp_path / "again", bits_per_weight=3.7)
    with monkeypatch.context() as patched:
        patched.setattr("compress.sweep.sensitivity._Measurement._measured", broken)
        again, _ = made(recipe, llama, tmp_path / "again", bits_per_weight=3.7)
    assert again.digest == whole[0].digest


def test_the_budget_is_one_and_can_be_met(recipe: dict[str, Any], tmp_path: Path) -> None:
    assert Auto().budget == Budget("bits", 4.0)
    assert Auto(size="2GB").budget == Budget("bytes", 2e9)
    with pytest.raises(ValidationError, match="one budget at a time, got bits_per_weight and max_kl"):
        Auto(bits_per_weight=4.0, max_kl=0.1)
    with pytest.raises(ValidationError, match="two numbers of bits"):
        Auto(candidates=(4, 4))
    with pytest.raises(ValidationError, match="such as 2GB"):
        Auto(size="2 gigs")
    model = models_zoo.write("llama", tmp_path)
    with pytest.raises(PlanError, match=r"with 2 bits everywhere it takes .* budget is 1,000 bytes"):
        made(recipe, model, tmp_path / "out", size="1KB")
    with pytest.raises(PlanError, match=r"2.5 bits a weight is below the fewest bits .* 3"):
        made(recipe, model, tmp_path / "out", bits_per_weight=2.5, candidates=[3, 4])
    assert not (tmp_path / "out").exists()


def test_the_rounder_is_found_by_name_and_belongs_to_the_key() -> None:
    with pytest.raises(UsageError, match=r"rounder 'gptk' is unknown.*did you mean 'gptq'"):
        _ = Auto(rounder="gptk").delegate
    with pytest.raises(UsageError, match="rounder 'auto' is unknown"):
        _ = Auto(rounder="auto").delegate
    keys = {step_key("parent", Auto(rounder=name), {}) for name in ("rtn", "gptq")}
    assert len(keys) == 2


def test_the_least_of_all_choices_was_found(recipe: dict[str, Any], tmp_path: Path) -> None:
    _, decided = made(
        recipe,
        models_zoo.write("llama", tmp_path),
        tmp_path / "out",
        bits_per_weight=3.4,
        candidates=[3, 4],
    )
    parts = list(decided["parts"].values())
    room = math.floor(3.4 * sum(part["weights"] for part in parts))
    best = min(
        sum(part["divergence"][str(bits)] for part, bits in zip(parts, choice, strict=True))
        for number in range(2 ** len(parts))
        for choice in [[3 + (number >> at & 1) for at in range(len(parts))]]
        if sum(part["weights"] * bits for part, bits in zip(parts, choice, strict=True)) <= room
    )
    assert decided["predicted_divergence"] == pytest.approx(best, rel=1e-4)
