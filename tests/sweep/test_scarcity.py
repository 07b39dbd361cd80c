"""Experts that calibration text hardly reached are named, where a person and where a program look."""

import csv
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from compress import engine
from compress.core.artifact import LAYERS_FILE, Artifact
from compress.sweep.scarcity import scarce, warning
from tests import models_zoo
from tests.dummies import Recorder


def treated(source: Path, out: Path, samples: int, step: dict[str, Any]) -> tuple[Artifact, Recorder]:
    file = out.parent / f"{samples}.safetensors"
    save_file({"input_ids": models_zoo.tokens(samples, 16)}, file)
    data = {"calibration": str(file), "samples": samples, "sequence_length": 16, "batch_size": 2}
    recipe = {"model": str(source), "steps": [step], "data": data, "threads": 1, "device": "cpu"}
    recorder = Recorder()
    result = engine.run(recipe, out, single=True, reporter=recorder)
    return Artifact.open(result.final), recorder


@pytest.mark.parametrize(
    "step", [{"use": "quantize.gptq", "bits": 4, "group_size": 16}, {"use": "prune.wanda", "sparsity": 0.5}]
)
def test_experts_with_fewer_tokens_than_inputs_are_named(step: dict[str, Any], tmp_path: Path) -> None:
    source = models_zoo.write("mixtral", tmp_path)
    artifact, recorder = treated(source, tmp_path / "few", 4, step)
    with (artifact.path / LAYERS_FILE).open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    expected = {row["layer"]: int(row["tokens"]) for row in rows if int(row["tokens"]) < int(row["columns"])}
    assert expected
    assert all(".experts." in name for name in expected)
    assert artifact.lineage is not None
    assert artifact.lineage.steps[-1].decisions["scarce"] == expected
    (said,) = [line for line in recorder.messages if "fewer calibration tokens" in line]
    assert said.startswith(f"warning: {len(expected)} of {len(rows)} matrices")
    least = min(expected.values())
    assert f"({least})" in said


def test_nothing_is_said_where_there_was_enough(tmp_path: Path) -> None:
    source = models_zoo.write("mixtral", tmp_path)
    artifact, recorder = treated(source, tmp_path / "many", 24, {"use": "prune.wanda", "sparsity": 0.5})
    assert artifact.lineage is not None
    assert "scarce" not in artifact.lineage.steps[-1].decisions
    assert not any("fewer calibration tokens" in line for line in recorder.messages)


def test_the_fewest_come_first_and_what_has_no_input_is_left_out() -> None:
    rows = [
        {"layer": "a", "columns": 64, "tokens": 63},
        {"layer": "b", "columns": 64, "tokens": 64},
        {"layer": "c", "columns": 64, "tokens": 5},
        {"layer": "embedding", "columns": 64},
        {"layer": "without data", "columns": 64, "tokens": 0},
    ]
    found = scarce(rows)
    assert list(found.items()) == [("c", 5), ("a", 63)]
    assert "2 of 5 matrices" in warning(found, 5)
    assert "fewest c (5)" in warning(found, 5)
