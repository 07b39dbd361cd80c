"""The sweep on every architecture: an identity treatment changes nothing, and blocks see what they should."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, final

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compress.core.artifact import Artifact
from compress.core.run import CalibrationSource, Run
from compress.models.blocks import Recording, Reentry, find_blocks
from compress.models.checkpoint import Checkpoint
from compress.models.load import skeleton
from compress.numerics.statistic import Statistic
from compress.sweep.matrices import find_matrices
from compress.sweep.sweep import Sweep
from compress.sweep.treatment import Treated
from tests import models_zoo
from tests.dummies import Recorder
from tests.sweep.dense import Dense, DenseTreatment

CPU = torch.device("cpu")


@final
class Identity(DenseTreatment):
    """Puts back what it got, after looking at every input."""

    def __init__(self, config: Mapping[str, Any], staged: bool = True) -> None:
        super().__init__(config)
        self.seen: list[int] = []
        self._staged = staged

    @property
    def staged(self) -> bool:
        return self._staged

    @property
    def original(self) -> bool:
        return False

    @property
    def joint(self) -> None:
        return None

    def treat(self, weight: torch.Tensor, statistic: Statistic | None, label: Hashable) -> Treated:
        assert statistic is not None
        self.seen.append(statistic.tokens)
        return Treated(Dense(weight))


def on_disk(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize("name", models_zoo.CONFIGURATIONS)
def test_an_identity_sweep_gives_the_same_weights_to_the_bit(name: str, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write(name, tmp_path))
    save_file({"input_ids": models_zoo.tokens(8, 16)}, tmp_path / "tokens.safetensors")
    target = tmp_path / "out"
    target.mkdir()
    calibration = CalibrationSource(str(tmp_path / "tokens.safetensors"), 8, 16, 4)
    run = Run(scratch=target / ".progress", calibration=calibration)
    model = skeleton(source)
    treatment = Identity(source.config)
    checkpoint = Checkpoint(source, model)
    labels = {
        matrix: "as it is"
        for block in find_blocks(model)
        for matrix in find_matrices(model, block.name, checkpoint).matrices
    }
    outcome = Sweep(treatment, source, target, run, model, checkpoint, labels, CPU).apply()
    before, after = on_disk(source.path), on_disk(target)
    assert before.keys() == after.keys()
    for tensor_name, tensor in before.items():
        assert torch.equal(tensor, after[tensor_name]), tensor_name
    assert outcome.decisions["matrices"] == len(labels)
    expected = set(outcome.tensors)
    assert expected == set(before)
    if labels:
        # Every token passes every layer of an ordinary block; experts share them out.
        assert max(treatment.seen) % (8 * 16) == 0


@pytest.mark.parametrize(("staged", "passes"), [(True, 3 * 4), (False, 3)])
def test_statistics_of_a_block_are_gathered_stage_by_stage_or_at_once(
    staged: bool, passes: int, tmp_path: Path
) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    save_file({"input_ids": models_zoo.tokens(8, 16)}, tmp_path / "tokens.safetensors")
    (tmp_path / "out").mkdir()
    recorder = Recorder()
    run = Run(
        scratch=tmp_path / "out" / ".progress",
        calibration=CalibrationSource(str(tmp_path / "tokens.safetensors"), 8, 16, 4),
        reporter=recorder,
    )
    model = skeleton(source)
    checkpoint = Checkpoint(source, model)
    labels = {
        matrix: "as it is"
        for block in find_blocks(model)
        for matrix in find_matrices(model, block.name, checkpoint).matrices
    }
    treatment = Identity(source.config, staged)
    outcome = Sweep(treatment, source, tmp_path / "out", run, model, checkpoint, labels, CPU).apply()
    # q, k and v; o; gate and up; down.
    assert recorder.count("block.calibrate") == passes
    assert outcome.decisions["matrices"] == 3 * 7
    assert set(treatment.seen) == {8 * 16}


@pytest.mark.parametrize("name", models_zoo.CONFIGURATIONS)
def test_reentry_gives_the_hidden_states_of_the_plain_model(name: str, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write(name, tmp_path))
    plain = skeleton(source)
    checkpoint = Checkpoint(source, plain)
    checkpoint.load(checkpoint.names, CPU)
    plain.tie_weights()
    batch = {"input_ids": models_zoo.tokens(2, 16)}
    expected: dict[str, torch.Tensor] = {}
    for block in find_blocks(plain):
        block.module.register_forward_hook(
            lambda _, __, output, name=block.name: expected.__setitem__(
                name, (output if isinstance(output, torch.Tensor) else output[0]).clone()
            )
        )
    with torch.no_grad():
        final = plain(**batch)

    model = skeleton(source)
    blocks = find_blocks(model)
    recording = Recording()
    checkpoint = Checkpoint(source, model)
    inside = tuple(f"{block.name}." for block in blocks)
    checkpoint.load([n for n in checkpoint.names if not checkpoint.target[n].startswith(inside)], CPU)
    model.tie_weights()
    with Reentry(model, blocks, CPU) as reentry:
        for block in blocks:
            checkpoint.load_module(block.name, CPU)
            reentry.advance(block.position, batch, recording)
            checkpoint.release(block.name)
            assert torch.equal(recording.hidden[block.stack], expected[block.name]), block.name
        output = reentry.run(len(blocks), batch, recording)
    assert torch.equal(output[0], final[0])
