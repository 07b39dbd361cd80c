"""A student of integers computes what its artifact computes, and is written back in its own format."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import engine
from compress.core.artifact import RUN_FILE, Artifact, Lineage, StepRecord
from compress.core.errors import EnvironmentFault, PlanError
from compress.core.recipe import Recipe
from compress.core.run import Run
from compress.sweep.verification import verify_weights
from compress.training import checkpoints, integers
from compress.training.student import Student
from compress.training.trainer import Trainer
from tests import models_zoo, packed_models, quantized_models
from tests.marks import slow_but
from tests.single_steps import tensors

KINDS: dict[str, dict[str, Any]] = {
    "int3": {"bits": 3, "group": 32},
    "int4-rows": {"bits": 4, "group": None},
    "int4-asymmetric": {"bits": 4, "group": 32, "symmetric": False},
    "int8": {"bits": 8, "group": 32},
    "with the head": {"bits": 4, "group": 32, "leave": ()},
}


def stored(folder: Path, kind: str, family: str = "llama") -> Artifact:
    source = packed_models.floats(family, folder / "floats")
    if not KINDS[kind].get("symmetric", True):
        # To load zero points transformers needs more in the configuration than the library writes.
        step = {"use": "quantize.rtn", "bits": 4, "group_size": 32, "symmetric": False}
        made = Recipe.of({"model": str(source), "threads": 1, "device": "cpu", "steps": [step]})
        return Artifact.open(engine.run(made, folder / "integers", single=True).final)
    return Artifact.open(packed_models.integers(source, folder / "integers", **KINDS[kind]))


def gptq(source: Artifact, folder: Path) -> Artifact:
    step = {"use": "export.gptq", "version": "v2", "inexact": "round"}
    made = Recipe.of({"model": str(source.path), "threads": 1, "device": "cpu", "steps": [step]})
    return Artifact.open(engine.run(made, folder, single=True).final)


def held(source: Artifact, target: Path, student: Student) -> dict[str, torch.Tensor]:
    """Write it, hold it against what was meant, and read it."""
    target.mkdir()
    meant = student.write(target, lambda *_: None)
    lineage = Lineage("source", (StepRecord("distill.logits", {}, "key", "digest"),), meant)
    verify_weights(Artifact.open(target), lineage, Run(), source)
    assert (target / "config.json").read_bytes() == (source.path / "config.json").read_bytes()
    return tensors(target)


@pytest.mark.parametrize(
    ("kind", "learns"),
    slow_but(
        [("int3", True), ("int4-asymmetric", False), ("int8", True), ("with the head", False)],
        itertools.product(KINDS, (False, True)),
    ),
)
def test_it_computes_what_the_artifact_stands_for(kind: str, learns: bool, tmp_path: Path) -> None:
    source = stored(tmp_path, kind)
    student = Student(source, Run(), scales=learns)
    tokens = models_zoo.tokens(2, 8)
    with torch.no_grad():
        expected = packed_models.dense(source.path)(tokens).logits
        # A reader multiplies in bfloat16.
        torch.testing.assert_close(student.model(tokens).logits, expected, rtol=3e-2, atol=3e-2)
    before = tensors(source.path)
    after = held(source, tmp_path / "same", student)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("kind", "form"),
    slow_but(
        [
            ("int3", "gptq"),
            ("int4-rows", "compressed-tensors"),
            ("int4-asymmetric", "gptq"),
            ("int8", "compressed-tensors"),
            ("with the head", "compressed-tensors"),
        ],
        # The exporter of GPTQ checkpoints leaves the head in floats.
        [
            case
            for case in itertools.product(KINDS, ("compressed-tensors", "gptq"))
            if case != ("with the head", "gptq")
        ],
    ),
)
def test_trained_integers_are_written_in_their_own_format(kind: str, form: str, tmp_path: Path) -> None:
    source = stored(tmp_path, kind)
    if form == "gptq":
        source = gptq(source, tmp_path / "gptq")
    student = Student(source, Run(), scales=True)
    tokens = models_zoo.tokens(4, 16)
    optimiser = torch.optim.Adam(student.model.parameters(), 1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        student.model(tokens, labels=tokens).loss.backward()
        optimiser.step()
    before, after = tensors(source.path), held(source, tmp_path / "out", student)
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {
        name: (t.dtype, t.shape) for name, t in after.items()
    }
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    words = {"qweight", "scales"} if form == "gptq" else {"weight_packed", "weight_scale"}
    assert changed >= words
    assert not changed & {"qzeros", "g_idx", "weight_zero_point", "weight_shape"}
    again = Student(Artifact.open(tmp_path / "out"), Run())
    with torch.no_grad():
        # Norms and embeddings are stored in bfloat16.
        found, expected = again.model(tokens).logits, student.model(tokens).logits
        torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)


def test_a_bias_beside_integers_is_trained_and_verified(tmp_path: Path) -> None:
    source = stored(tmp_path, "int8", "llama-biased")
    student = Student(source, Run())
    with torch.no_grad():
        for name, weight in student.model.named_parameters():
            if name.endswith("up_proj.bias"):
                weight.add_(1.0)
    before, after = tensors(source.path), held(source, tmp_path / "out", student)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("up_proj.bias")} != set()


def test_a_student_that_learned_nothing_takes_its_integers_again(tmp_path: Path) -> None:
    source = stored(tmp_path, "int4-asymmetric", "llama-tied")
    student = Student(source, Run(), scales=True)
    with torch.no_grad():
        for weight in student.model.parameters():
            weight.add_(0.1)
    student.reload()
    before, after = tensors(source.path), held(source, tmp_path / "out", student)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_tied_tables_are_on_one_grid(tmp_path: Path) -> None:
    floats = packed_models.floats("llama-tied", tmp_path / "floats")
    options = {"bits": 4, "group_size": 32, "include": ["model.embed_tokens", "lm_head"]}
    made = Recipe.of(
        {"model": str(floats), "threads": 1, "device": "cpu", "steps": [{"use": "quantize.rtn", **options}]}
    )
    source = Artifact.open(engine.run(made, tmp_path / "integers", single=True).final)
    student = Student(source, Run())
    assert student.model.lm_head.weight.equal(student.model.model.embed_tokens.weight)
    with torch.no_grad():
        for weight in student.model.parameters():
            weight.mul_(0.9)
    assert student.model.lm_head.weight.equal(student.model.model.embed_tokens.weight)
    held(source, tmp_path / "out", student)


def test_it_starts_from_the_floats_that_round_to_its_integers(tmp_path: Path) -> None:
    source = stored(tmp_path, "int3")
    origin = Artifact.open(tmp_path / "floats")
    student, bare = Student(source, Run(), origin=origin), Student(source, Run())
    module = student.model.model.layers[0].mlp.up_proj
    floats = load_file(origin.path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].float()
    # Of every other row the integers were turned around, so that these floats did not round to them.
    latent, seen = (each.detach()[1::2] for each in (module.parametrizations.weight.original, module.weight))
    assert float((latent - floats[1::2]).norm()) < 0.2 * float((seen - floats[1::2]).norm())
    assert torch.equal(module.weight, bare.model.model.layers[0].mlp.up_proj.weight)
    assert isinstance(
        bare.model.model.layers[0].mlp.up_proj.parametrizations.weight.original, integers.Latent
    )
    other = Artifact.open(packed_models.floats("llama", tmp_path / "other", intermediate_size=64))
    with pytest.raises(PlanError, match=r"64 x 128 in .* and 64 x 64"):
        Student(source, Run(), origin=other)
    with pytest.raises(PlanError, match="no float weights"):
        Student(source, Run(), origin=source)


class Numbers(Trainer):
    def check(self, source: Any, run: Any) -> Any: ...
    def apply(self, source: Any, target: Any, run: Any) -> Any: ...


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    floats = models_zoo.write("mixtral", tmp_path, dtype=torch.bfloat16)
    made = Recipe.of(
        {
            "model": str(floats),
            "threads": 1,
            "device": "cpu",
            "steps": [{"use": "quantize.rtn", "bits": 4, "group_size": 16}],
        }
    )
    experts = Artifact.open(engine.run(made, tmp_path / "integers", single=True).final)
    with pytest.raises(PlanError, match="experts"):
        integers.check(Numbers(), experts, Run())
    with pytest.raises(PlanError, match="no model of integers, for which --scales train and --origin"):
        integers.check(Numbers(scales="train", origin="m"), Artifact.open(floats), Run())
    plain = models_zoo.write("llama", tmp_path, dtype=torch.bfloat16)
    quantized_models.write(plain, tmp_path / "eight", bits=8, group=None, packing="int-quantized")
    integers.check(Numbers(), Artifact.open(tmp_path / "eight"), Run())
    student = Student(Artifact.open(tmp_path / "eight"), Run())
    with torch.no_grad():
        for weight in student.model.parameters():
            weight.mul_(1.1)
    held(Artifact.open(tmp_path / "eight"), tmp_path / "out", student)


def test_a_run_that_was_interrupted_goes_on_to_the_same_integers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = gptq(stored(tmp_path, "int4-asymmetric"), tmp_path / "gptq")
    save_file({"input_ids": models_zoo.tokens(24, 16)}, tmp_path / "tokens.safetensors")
    packed_models.floats("llama", tmp_path / "teacher", num_hidden_layers=3)
    step = {"use": "distill.logits", "teacher": str(tmp_path / "teacher"), "origin": str(tmp_path / "floats")}
    step |= {"tokens": 256, "window": 16, "batch": 4, "checkpoint_every": 1, "learning_rate": 1e-2}
    step |= {"scales": "train", "keep": "last", "precision": "float32"}
    made = Recipe.of(
        {
            "model": str(source.path),
            "threads": 1,
            "device": "cpu",
            "data": {"train": str(tmp_path / "tokens.safetensors")},
            "steps": [step],
        }
    )
    engine.run(made, tmp_path / "whole", single=True)
    real, calls = checkpoints.Checkpoints.save, []

    def save(self: Any, position: Any) -> None:
        calls.append(position)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        real(self, position)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.Checkpoints, "save", save)
        with pytest.raises(EnvironmentFault, match="No space left"):
            engine.run(made, tmp_path / "out", single=True)
    engine.run(made, tmp_path / "out", single=True)
    for file in (tmp_path / "whole").iterdir():
        if file.name != RUN_FILE:
            assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
    before, after = tensors(source.path), tensors(tmp_path / "out")
    assert sum(not torch.equal(before[name], after[name]) for name in before if "qweight" in name) == 14


@pytest.mark.slow
def test_half_of_what_three_bits_cost_is_regained(tmp_path: Path) -> None:
    """Of the divergence from the float model, on text that is not trained on."""
    rounding = {"use": "quantize.rtn", "bits": 3, "group_size": "channel"}
    training = {"use": "distill.logits", "teacher": "$model", "tokens": 65_536}
    training |= {"window": 128, "batch": 8, "learning_rate": 5e-4}
    made = Recipe.of(
        {
            "model": "builtin:quickstart",
            "threads": 1,
            "device": "cpu",
            "data": {"train": "builtin:stories"},
            "steps": [rounding, {**training, "precision": "float32"}],
        }
    )
    lineage = Lineage.read(engine.run(made, tmp_path / "out").final)
    assert lineage is not None
    found = lineage.steps[-1].decisions["validation"]
    assert found["best"]["divergence"] < 0.5 * found["before"]["divergence"]
