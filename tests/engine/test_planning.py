"""Planning: what cannot work is refused before anything is written."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from compress import engine
from compress.core.errors import (
    EnvironmentFault,
    ModelError,
    PlanError,
    TargetError,
    UsageError,
)
from compress.core.target import Target
from tests import models_zoo
from tests.engine.conftest import RTN, recipe


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_chain_that_cannot_work_is_refused_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"step 1 \(quantize.rtn\) needs float weights, which quantize.rtn"):
        engine.run(recipe(model, RTN, RTN), tmp_path / "out")
    assert listing(tmp_path) == []


def test_one_of_several_facts_is_enough_and_none_of_them_is_too_little(model: Path, tmp_path: Path) -> None:
    distilling = {"use": "distill.logits", "teacher": str(model)}
    words = (
        r"step 1 \(distill.logits\) needs a GPTQ checkpoint or a transformers model folder, which export.gguf"
    )
    with pytest.raises(PlanError, match=words):
        engine.plan(recipe(model, {"use": "export.gguf"}, distilling), tmp_path / "out")
    with pytest.raises(PlanError, match=r"step 2 .* needs training text"):
        engine.plan(recipe(model, RTN, {"use": "export.gptq"}, distilling), tmp_path / "out")


def test_an_artifact_of_ours_cannot_be_quantized_again(model: Path, tmp_path: Path) -> None:
    engine.run(recipe(model, RTN), tmp_path / "out", single=True)
    with pytest.raises(PlanError, match="needs float weights"):
        engine.plan(recipe(tmp_path / "out", RTN), tmp_path / "again")


def test_a_plan_predicts_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    plan = engine.plan(recipe(model, RTN), tmp_path / "out", single=True)
    (row,) = plan.describe()
    assert row["done"] is False
    assert listing(tmp_path) == []
    engine.execute(plan)
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    # Headers come on top of the tensors that the prediction counts.
    assert row["disk_bytes"] <= written <= row["disk_bytes"] * 1.5
    assert engine.plan(recipe(model, RTN), tmp_path / "out", single=True).already_done


def test_what_a_pass_stands_for_is_refused_before_the_first_of_it_runs(tmp_path: Path) -> None:
    source = models_zoo.write("gpt2", tmp_path / "models")
    save_file({"input_ids": models_zoo.tokens()}, tmp_path / "models" / "tokens.safetensors")
    data = {
        "calibration": str(tmp_path / "models" / "tokens.safetensors"),
        "samples": 4,
        "sequence_length": 16,
    }
    # Factors can be moved in this model; rounding is what it cannot take.
    engine.plan(recipe(source, {"use": "transform.awq", "group_size": 16}, data=data), tmp_path / "out")
    with pytest.raises(PlanError, match=r"c_attn.*compressed-tensors cannot hold"):
        engine.plan(recipe(source, {"use": "quantize.awq", "group_size": 16}, data=data), tmp_path / "out")
    assert listing(tmp_path) == ["models"]


def test_a_disk_that_is_too_small_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Target, "room", lambda _: 1000)
    with pytest.raises(EnvironmentFault, match="of disk"):
        engine.run(recipe(model, RTN), tmp_path / "out")
    assert listing(tmp_path) == []


def test_a_folder_that_is_not_ours_is_refused_and_untouched(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    for single in (True, False):
        with pytest.raises(TargetError, match="not made by compress"):
            engine.run(recipe(model, RTN), tmp_path / "out", single=single)
    assert listing(tmp_path) == ["out"]
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def test_the_key_changes_with_everything_that_can_change_a_byte(model: Path, tmp_path: Path) -> None:
    def key(**changes: Any) -> str | None:
        step = {**RTN, **changes.pop("step", {})}
        return engine.plan(recipe(model, step, **changes), tmp_path / "out", single=True).steps[0].key

    base = key()
    assert base == key()
    assert base == key(seed=1), "rounding to nearest draws nothing, so the seed is not part of it"
    different = [key(step={"bits": 8}), key(**{"threads": 2}), key(task="text-generation")]
    assert len({base, *different}) == 4


def test_an_unknown_model_names_what_is_near(model: Path, tmp_path: Path) -> None:
    with pytest.raises((ModelError, UsageError)):
        engine.plan(recipe(model.parent / "lama", RTN), tmp_path / "out")
