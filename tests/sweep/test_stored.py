"""What a verification of another engine's format finds: what is lost, what is strange, what is not meant."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import engine
from compress.core.artifact import Artifact, Lineage
from compress.core.errors import VerificationError
from compress.core.passes import Meant
from compress.core.recipe import Recipe, Step
from compress.core.run import Run
from compress.sweep.stored import is_stored_otherwise, verify_stored
from tests import packed_models

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(params=["export.awq", "export.gguf"])
def found(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Artifact, Lineage]:
    source = packed_models.integers(packed_models.floats("llama", tmp_path / "f"), tmp_path / "integers")
    recipe = Recipe(model=str(source), threads=1, device="cpu", steps=(Step(use=request.param),))
    engine.run(recipe, tmp_path / "out", single=True)
    artifact = Artifact.open(tmp_path / "out")
    assert artifact.lineage is not None
    assert is_stored_otherwise(artifact)
    assert not is_stored_otherwise(Artifact.open(source))
    return artifact, artifact.lineage


def test_what_is_lost_is_named(found: tuple[Artifact, Lineage]) -> None:
    artifact, lineage = found
    verify_stored(artifact, lineage, Run())
    more = {**lineage.tensors, "model.layers.0.mlp.up_proj.bias": Meant("", False)}
    with pytest.raises(VerificationError, match=r"up_proj\.bias should be in the artifact"):
        verify_stored(artifact, replace(lineage, tensors=more), Run())


def test_what_nobody_meant_is_named(found: tuple[Artifact, Lineage]) -> None:
    artifact, lineage = found
    fewer = {name: meant for name, meant in lineage.tensors.items() if name != f"{UP}.weight"}
    with pytest.raises(VerificationError, match="no pass meant to write it"):
        verify_stored(artifact, replace(lineage, tensors=fewer), Run())


def test_other_values_are_named(found: tuple[Artifact, Lineage]) -> None:
    artifact, lineage = found
    other = {**lineage.tensors, f"{UP}.weight": Meant("0" * 64, True)}
    with pytest.raises(VerificationError, match=r"up_proj\.weight reads back with other values"):
        verify_stored(artifact, replace(lineage, tensors=other), Run())


def test_a_configuration_that_contradicts_the_tensors_is_found(tmp_path: Path) -> None:
    source = packed_models.integers(packed_models.floats("llama", tmp_path / "f"), tmp_path / "integers")
    recipe = Recipe(model=str(source), threads=1, device="cpu", steps=(Step(use="export.gptq"),))
    engine.run(recipe, tmp_path / "out", single=True)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{UP}.g_idx"] = torch.zeros(32, dtype=torch.int32)
    save_file(tensors, file)
    artifact = Artifact.open(tmp_path / "out")
    assert artifact.lineage is not None
    with pytest.raises(VerificationError, match="its tensors are not those of 4 bits"):
        verify_stored(artifact, artifact.lineage, Run())
