"""A block as one problem: its error and gradients, the original model's stream, and resuming with it."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, final

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM

from compress import engine
from compress.core.artifact import Artifact
from compress.core.run import CalibrationSource, Run
from compress.models.blocks import find_blocks
from compress.models.checkpoint import Checkpoint
from compress.models.load import skeleton
from compress.numerics.statistic import Statistic
from compress.sweep.activations import Activations
from compress.sweep.joint import BlockProblem, JointTreatment, SweptBlock
from compress.sweep.matrices import Matrix, find_matrices
from compress.sweep.sweep import Sweep
from compress.sweep.treatment import Replacement, Treated
from tests import models_zoo
from tests.dummies import Recorder
from tests.marks import slow_but
from tests.single_steps import tensors
from tests.sweep.dense import Dense, DenseTreatment

CPU = torch.device("cpu")
SAMPLES, LENGTH, BATCH = 8, 16, 4


@final
@dataclass
class Look(JointTreatment):
    """Looks at each block and puts three quarters of every matrix there; what it saw is for the tests.

    Attributes:
        errors: of each block with the weights of the source.
        slopes: of each block in one direction, as told and as measured.
    """

    errors: list[float] = field(default_factory=list)
    slopes: list[tuple[float, float]] = field(default_factory=list)

    def treat(
        self,
        first: Mapping[Matrix, Replacement],
        labels: Mapping[Matrix, Hashable],
        problem: BlockProblem,
    ) -> dict[Matrix, Treated]:
        assert set(first) == set(labels)
        weights = {matrix: problem.weight(matrix).clone() for matrix in first}
        assert all(torch.equal(first[matrix].value(), 0.5 * weight) for matrix, weight in weights.items())
        self.errors.append(problem.mean_error())
        for matrix in list(first)[::3]:
            problem.put(matrix, 0.7 * weights[matrix])
        batch = problem.batches - 1
        _, slopes = problem.gradients(batch)
        matrix = list(first)[-1]
        # Along the gradient, where the difference stands out most from the rounding of float32.
        direction = slopes[matrix] / slopes[matrix].norm() * slopes[matrix].numel() ** 0.5
        values, ends = problem.weight(matrix).clone(), []
        # So small because a norm behind a matrix bends the error within a thousandth.
        for step in (3e-5, -3e-5):
            problem.put(matrix, values + step * direction)
            total, count = problem.error(batch)
            ends.append(total / count)
        # The gradient is that of the squared error of a position, 32 numbers.
        self.slopes.append((float((slopes[matrix] * direction).sum()) / 32, (ends[0] - ends[1]) / 6e-5))
        return {matrix: Treated(Dense(0.75 * weight), {"jointly": 1}) for matrix, weight in weights.items()}


@final
class Halves(DenseTreatment):
    """Halves every matrix."""

    def __init__(self, config: Mapping[str, Any], look: Look | None) -> None:
        super().__init__(config)
        self.look = look

    @property
    def staged(self) -> bool:
        return True

    @property
    def original(self) -> bool:
        return True

    @property
    def joint(self) -> JointTreatment | None:
        return self.look

    def treat(self, weight: torch.Tensor, statistic: Statistic | None, label: Hashable) -> Treated:
        return Treated(Dense(weight * 0.5), {"alone": 1})


def swept(name: str, folder: Path, look: Look | None) -> tuple[Any, Path, Recorder]:
    """Run the treatment over a tiny model."""
    source = Artifact.open(models_zoo.write(name, folder))
    save_file({"input_ids": models_zoo.tokens(SAMPLES, LENGTH)}, folder / "tokens.safetensors")
    target = folder / "out"
    target.mkdir()
    recorder = Recorder()
    run = Run(
        scratch=target / ".progress",
        calibration=CalibrationSource(str(folder / "tokens.safetensors"), SAMPLES, LENGTH, BATCH),
        reporter=recorder,
    )
    model = skeleton(source)
    checkpoint = Checkpoint(source, model)
    labels = {
        matrix: "half"
        for block in find_blocks(model)
        for matrix in find_matrices(model, block.name, checkpoint).matrices
    }
    treatment = Halves(source.config, look)
    outcome = Sweep(treatment, source, target, run, model, checkpoint, labels, CPU).apply()
    return outcome, target, recorder


def states(folder: Path, name: str) -> list[torch.Tensor]:
    """What each block of a model says for all calibration tokens."""
    kind = AutoModel if name in models_zoo.ENCODERS else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    seen: list[torch.Tensor] = []
    for block in find_blocks(model):
        block.module.register_forward_hook(
            lambda _, __, output: seen.append(output if isinstance(output, torch.Tensor) else output[0])
        )
    with torch.no_grad():
        model(input_ids=models_zoo.tokens(SAMPLES, LENGTH))
    return seen


NAMES = ["llama", "qwen2-sliding", "gemma3", "mixtral", "bert", "opt"]
STANDING_FOR_OTHERS = ("qwen2-sliding", "mixtral", "bert")


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path, Recorder, Look]]:
    """The treatment of each model with a look at it, done once."""

    @cache
    def once(name: str) -> tuple[Any, Path, Recorder, Look]:
        look = Look()
        return *swept(name, tmp_path_factory.mktemp(name), look), look

    return once


@pytest.mark.parametrize("name", slow_but(STANDING_FOR_OTHERS, NAMES))
def test_the_matrices_of_a_block_are_treated_together_after_each_was_alone(name: str, looked: Any) -> None:
    outcome, target, recorder, look = looked(name)
    before, after = tensors(target.parent / name), tensors(target)
    changed = {tensor for tensor, meant in outcome.tensors.items() if meant.changed}
    assert changed
    for tensor, value in before.items():
        assert torch.equal(after[tensor], 0.75 * value if tensor in changed else value), tensor
        if tensor in changed:
            assert outcome.tensors[tensor].error == pytest.approx(0.25)
    rows = outcome.decisions["layers"].values()
    assert all((row["alone"], row["jointly"], row["error"]) == ("1", "1", "0.25") for row in rows)
    assert recorder.count("block.joint") == 3 == len(look.slopes)


@pytest.mark.parametrize("name", slow_but(STANDING_FOR_OTHERS, NAMES))
def test_gradients_are_those_of_the_error(name: str, looked: Any) -> None:
    *_, look = looked(name)
    for found, expected in look.slopes:
        assert found == pytest.approx(expected, rel=0.03, abs=1e-6)


@pytest.mark.parametrize(
    "name", slow_but(("qwen2-sliding", "bert"), ("llama", "qwen2-sliding", "gemma3", "bert"))
)
def test_a_block_is_held_to_the_original_on_the_original_activations(
    name: str, looked: Any, tmp_path: Path
) -> None:
    """With the source's weights in block k, the error is how far the blocks before it led away."""
    _, target, _, look = looked(name)
    plain = states(target.parent / name, name)
    assert look.errors[0] == 0
    for position in (1, 2):
        mixed = tmp_path / f"mixed-{position}"
        model = (AutoModel if name in models_zoo.ENCODERS else AutoModelForCausalLM).from_pretrained(target)
        source = type(model).from_pretrained(target.parent / name)
        find_blocks(model)[position].module.load_state_dict(find_blocks(source)[position].module.state_dict())
        model.save_pretrained(mixed)
        error = (states(mixed, name)[position] - plain[position]).square().mean()
        assert look.errors[position] == pytest.approx(float(error), rel=1e-3)


def test_who_asks_for_the_original_alone_gets_its_stream_and_no_more(tmp_path: Path) -> None:
    outcome, _, recorder = swept("llama", tmp_path, None)
    assert recorder.count("block.joint") == 0
    assert all(row["alone"] == "1" and "jointly" not in row for row in outcome.decisions["layers"].values())


def test_both_streams_are_saved_and_restored(tmp_path: Path) -> None:
    tokens = models_zoo.tokens(5, 8)
    activations = Activations(tokens, 2, original=True)
    for number, recording in enumerate([*activations.recordings, *activations.original]):
        recording.hidden.update({0: torch.full((2, 8, 4), float(number)), 1: torch.rand(2, 8, 4)})
        recording.extras[3] = (torch.rand(2), None)
    activations.save(tmp_path / "file.safetensors")
    again = Activations(tokens, 2, original=True)
    again.restore(tmp_path / "file.safetensors")
    assert len(again.recordings) == len(again.original) == 3
    for kept, found in zip(
        [*activations.recordings, *activations.original], [*again.recordings, *again.original], strict=True
    ):
        assert all(torch.equal(kept.hidden[stack], found.hidden[stack]) for stack in (0, 1))
        assert torch.equal(kept.extras[3][0], found.extras[3][0])
        assert found.extras[3][1] is None
    assert Activations(tokens, 2).original == []


class Stopped(Exception):
    """Stands for a crash."""


@final
class Stopping(Recorder):
    """Stops the run at one event of one block."""

    def __init__(self, name: str, position: int) -> None:
        super().__init__()
        self._at = (name, position)

    def event(self, name: str, **facts: object) -> None:
        super().event(name, **facts)
        if (name, facts.get("position")) == self._at:
            raise Stopped


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("block.joint", 1),
        pytest.param("block.advance", 2, marks=pytest.mark.slow),
        pytest.param("block.start", 3, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_stopped_goes_on_to_the_same_bytes(name: str, position: int, tmp_path: Path) -> None:
    model = models_zoo.write("llama", tmp_path)
    save_file({"input_ids": models_zoo.tokens(SAMPLES, LENGTH)}, tmp_path / "tokens.safetensors")
    text = {
        "calibration": str(tmp_path / "tokens.safetensors"),
        "samples": SAMPLES,
        "sequence_length": LENGTH,
    }
    step = {"use": "quantize.autoround", "bits": 2, "group_size": 16, "iterations": 6, "start": "nearest"}
    recipe = {"model": str(model), "threads": 1, "data": {**text, "batch_size": 2}, "steps": [step]}
    whole = engine.run(recipe, tmp_path / "whole", single=True).final
    with pytest.raises(Stopped):
        engine.run(recipe, tmp_path / "stopped", single=True, reporter=Stopping(name, position))
    recorder = Recorder()
    resumed = engine.run(recipe, tmp_path / "stopped", single=True, reporter=recorder).final
    assert recorder.count("block.resume") == position
    assert recorder.count("block.joint") == 3 - min(position, 3)
    for file in [*sorted(whole.glob("*.safetensors")), whole / "compress.json", whole / "config.json"]:
        assert file.read_bytes() == (resumed / file.name).read_bytes(), file.name


def test_only_the_matrices_of_the_block_need_gradients(tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write("llama", tmp_path))
    model = skeleton(source)
    checkpoint = Checkpoint(source, model)
    checkpoint.load(checkpoint.names, CPU)
    block = find_blocks(model)[1]
    matrices = find_matrices(model, block.name, checkpoint).matrices[:2]
    SweptBlock(block, matrices, model, None, None, Run())  # type: ignore[arg-type]
    needing = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert needing == {matrix.parameter for matrix in matrices}
