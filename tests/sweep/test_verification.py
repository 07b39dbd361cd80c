"""Every planted fault is caught: verification compares, it does not merely load."""

import json
import operator
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compress.core.artifact import Artifact, Lineage, StepRecord
from compress.core.errors import PlanError, VerificationError
from compress.core.run import Run
from compress.quantize.rtn import Rtn
from compress.sweep import verification
from compress.sweep.verification import rehearse, verify_weights
from tests import models_zoo

LAYER = "model.layers.1.self_attn.q_proj"
SHARD = "model-00002-of-00004.safetensors"
Tensors = dict[str, torch.Tensor]


def make(folder: Path, seed: int = 0) -> tuple[Artifact, Path, Lineage]:
    """A source, its rounded artifact, and what was meant."""
    source = Artifact.open(models_zoo.write("llama", folder, seed=seed))
    target = folder / "out"
    target.mkdir()
    outcome = Rtn(group_size=16).apply(source, target, Run(scratch=target / ".progress"))
    record = StepRecord("quantize.rtn", {}, "key", "digest", {}, outcome.decisions)
    return source, target, Lineage(source.digest, (record,), outcome.tensors)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Path, Lineage]:
    return make(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def made(pristine: tuple[Artifact, Path, Lineage], tmp_path: Path) -> tuple[Artifact, Path, Lineage]:
    """The same, in a copy that a test may damage."""
    source, target, lineage = pristine
    shutil.copytree(target, tmp_path / "out")
    return source, tmp_path / "out", lineage


def verify(source: Artifact | None, target: Path, lineage: Lineage) -> None:
    verify_weights(Artifact.open(target), lineage, Run(), source)


def edit(file: Path, change: Callable[[Tensors], None]) -> None:
    """Rewrite a shard as a faulty writer would have written it."""
    with safe_open(file, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    weight_map = json.loads((file.parent / "model.safetensors.index.json").read_text())
    names = {name: where for name, where in weight_map["weight_map"].items() if where != file.name}
    weight_map["weight_map"] = names | dict.fromkeys(tensors, file.name)
    (file.parent / "model.safetensors.index.json").write_text(json.dumps(weight_map))


def test_what_was_written_rightly_passes(made: tuple[Artifact, Path, Lineage]) -> None:
    source, target, lineage = made
    verified = verify_weights(Artifact.open(target), lineage, Run(), source)
    assert (verified.changed, verified.unchanged) == (21, 9)


@pytest.mark.parametrize("declared", [False, True])
def test_a_layer_left_float(made: tuple[Artifact, Path, Lineage], declared: bool) -> None:
    source, target, lineage = made

    def leave(tensors: Tensors) -> None:
        for part in ("packed", "scale", "shape"):
            del tensors[f"{LAYER}.weight_{part}"]
        with safe_open(source.weight_files[0], framework="pt") as handle:
            tensors[f"{LAYER}.weight"] = handle.get_tensor(f"{LAYER}.weight")

    edit(target / SHARD, leave)
    if declared:  # the configuration agrees with the file, so the loader has nothing to complain about
        config = json.loads((target / "config.json").read_text())
        config["quantization_config"]["ignore"].append(LAYER)
        (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match="q_proj"):
        verify(source, target, lineage)


def test_a_scale_off_by_one_group(made: tuple[Artifact, Path, Lineage]) -> None:
    source, target, lineage = made
    name = f"{LAYER}.weight_scale"
    edit(target / SHARD, lambda tensors: tensors.update({name: tensors[name].roll(1, dims=1).contiguous()}))
    with pytest.raises(VerificationError, match=r"q_proj.*other values than were meant: relative distance"):
        verify(source, target, lineage)


def test_two_rows_swapped(made: tuple[Artifact, Path, Lineage]) -> None:
    _, target, lineage = made
    name = f"{LAYER}.weight_packed"

    def swap(tensors: Tensors) -> None:
        tensors[name][[3, 4]] = tensors[name][[4, 3]]

    edit(target / SHARD, swap)
    with pytest.raises(VerificationError, match="q_proj"):
        verify(None, target, lineage)


def test_a_layer_never_calibrated(made: tuple[Artifact, Path, Lineage]) -> None:
    source, target, lineage = made
    step = lineage.steps[0]
    layers = {name: {**row, "tokens": 64} for name, row in step.decisions["layers"].items()}
    record = replace(step, use="quantize.gptq", decisions={**step.decisions, "layers": layers})
    verify(source, target, replace(lineage, steps=(record,)))
    layers[LAYER]["tokens"] = 0
    with pytest.raises(VerificationError, match=rf"{LAYER} was never calibrated"):
        verify(source, target, replace(lineage, steps=(record,)))


def test_a_shard_of_another_run(made: tuple[Artifact, Path, Lineage], tmp_path: Path) -> None:
    _, target, lineage = made
    (tmp_path / "other").mkdir()
    _, other, _ = make(tmp_path / "other", seed=1)
    shutil.copyfile(other / SHARD, target / SHARD)
    with pytest.raises(VerificationError, match=r"model\.layers\.1\."):
        verify(None, target, lineage)


def test_an_untouched_tensor_that_changed(made: tuple[Artifact, Path, Lineage]) -> None:
    source, target, lineage = made
    edit(target / SHARD, lambda tensors: tensors["model.layers.1.input_layernorm.weight"].mul_(1.5))
    with pytest.raises(VerificationError, match=r"input_layernorm.*untouched"):
        verify(source, target, lineage)


def test_a_missing_and_an_unexpected_tensor(made: tuple[Artifact, Path, Lineage]) -> None:
    source, target, lineage = made
    edit(target / SHARD, lambda tensors: tensors.update({"model.layers.1.stray": torch.ones(2)}))
    with pytest.raises(VerificationError, match="stray"):
        verify(source, target, lineage)
    edit(target / SHARD, lambda tensors: operator.delitem(tensors, "model.layers.1.stray"))
    edit(target / SHARD, lambda tensors: operator.delitem(tensors, f"{LAYER}.weight_scale"))
    with pytest.raises(VerificationError, match="q_proj"):
        verify(source, target, lineage)


def test_a_configuration_is_rehearsed_once_and_refused_as_often_as_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    tried = []

    def prepared(artifact: Artifact, quantization: dict[str, int], run: Run) -> None:
        tried.append(quantization)
        if quantization["bits"] == 3:
            raise PlanError("cannot be loaded", "use another")

    monkeypatch.setattr(verification, "prepared", prepared)
    for bits in (4, 4, 3, 3):
        if bits == 4:
            rehearse(source, {"bits": bits}, Run())
            continue
        with pytest.raises(PlanError, match=r"cannot be loaded \(hint: use another\)"):
            rehearse(source, {"bits": bits}, Run())
    assert tried == [{"bits": 4}, {"bits": 3}]
