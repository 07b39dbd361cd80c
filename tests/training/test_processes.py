"""Several processes: the gradients and losses of one, and a clean end when one of them dies."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from compress.core.artifact import TRAINING_FILE, Lineage
from compress.core.errors import EnvironmentFault, PlanError
from compress.core.launch import launch
from compress.core.passes import build
from compress.core.run import Run
from compress.data.training import TrainingText
from compress.numerics.criterion import Criterion
from compress.training.head import halves
from compress.training.imitation import Distributions, LiveTeacher
from compress.training.loop import Loop
from compress.training.objective import Losses
from compress.training.processes import Processes, _buckets, joined
from tests import models_zoo, together

STEPS = 10
WORDS = {
    "--tokens": STEPS * 128,
    "--window": 16,
    "--batch": 4,
    "--accumulation": 2,
    "--evaluate-every": 5,
    "--evaluation-tokens": 48,
    "--checkpoint-every": 3,
    "--learning-rate": "3e-3",
    "--precision": "float32",
    "--threads": 2,
    "--device": "cpu",
}


def gradient(folder: Path, count: int) -> None:
    """The gradient of one step, by this process and the others, into a file."""
    here = launch()
    torch.set_num_threads(1)
    student, teacher = models_zoo.build("mixtral", seed=1), models_zoo.build("mixtral", seed=2)
    probe = models_zoo.tokens(1, 8)
    objective = Distributions(
        halves(student, probe),
        LiveTeacher(halves(teacher.requires_grad_(False), probe)),
        criterion=Criterion({"forward_kl": 0.75, "cross_entropy": 0.25}, temperature=2.0),
        chunk=7,
        arithmetic="float32",
    )
    windows = models_zoo.tokens(5, 12)
    with joined(distributed.FileStore(str(folder / f"store-{count}"), count), here, "cpu", 2):
        processes = Processes()
        losses = objective.learn(processes.share(windows), 55)
        processes.add_up(list(student.parameters()))
        total = processes.total(losses, objective.names, torch.device("cpu"))
    assert total.positions == 55
    found = {
        name: weight.grad.contiguous()
        for name, weight in student.named_parameters()
        if weight.grad is not None
    }
    found |= {f"loss {name}": torch.tensor(value) for name, value in total.means().items()}
    save_file(found, folder / f"gradient-{count}-{here.rank}.safetensors")


def test_two_processes_have_the_gradient_of_one_with_twice_the_batch(tmp_path: Path) -> None:
    for count in (1, 2):
        assert together.run(count, gradient, tmp_path, count) == [0] * count
    whole = load_file(tmp_path / "gradient-1-0.safetensors")
    for rank in (0, 1):
        found = load_file(tmp_path / f"gradient-2-{rank}.safetensors")
        assert found.keys() == whole.keys()
        for name, wanted in whole.items():
            distance = torch.linalg.vector_norm(found[name] - wanted) / torch.linalg.vector_norm(wanted)
            assert distance <= 1e-5, name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    models_zoo.write("llama-tied", folder / "teacher", seed=1)
    models_zoo.write("llama-tied", folder / "student", seed=2)
    save_file({"input_ids": models_zoo.tokens(40, 16)}, folder / "tokens.safetensors")
    return folder


def words(place: Path, out: Path, use: str = "logits") -> list[str]:
    given = {
        "--teacher": place / "teacher" / "llama-tied",
        "--train": place / "tokens.safetensors",
        "--out": out,
        **WORDS,
    }
    flags = [str(word) for pair in given.items() for word in pair]
    return ["distill", use, str(place / "student" / "llama-tied"), *flags]


def table(out: Path) -> list[dict[str, str]]:
    with (out / TRAINING_FILE).open(newline="") as stream:
        return list(csv.DictReader(stream))


def same(found: Path, wanted: Path) -> None:
    """The losses and the weights of two results, up to rounding."""
    rows, expected = table(found), table(wanted)
    assert len(rows) == len(expected) == STEPS + 1
    for row, other in zip(rows, expected, strict=True):
        assert [name for name in row if row[name]] == [name for name in other if other[name]]
        for name, text in other.items():
            if text:
                assert float(row[name]) == pytest.approx(float(text), rel=1e-3, abs=1e-9), name
    weights, others = load_file(found / "model.safetensors"), load_file(wanted / "model.safetensors")
    for name, wanted_ in others.items():
        distance = torch.linalg.vector_norm(weights[name] - wanted_) / torch.linalg.vector_norm(wanted_)
        assert distance < 1e-3, name


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    assert together.run(1, together.command, words(place, place / "alone"), place / "alone.log") == [0]
    return place / "alone"


def events(log: Path, rank: int) -> list[dict[str, Any]]:
    file = log.with_name(f"{log.name}.{rank}.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_two_processes_have_the_losses_of_one_and_one_of_them_writes(
    place: Path, alone: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "target" / "out", tmp_path / "log"
    assert together.run(2, together.command, words(place, out), log) == [0, 0]
    same(out, alone)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert together.output(log, 0) == f"{out}\n"
    assert together.output(log, 1) == ""
    assert events(log, 1) == [], "one of them reports"
    assert [event["name"] for event in events(log, 0)].count("artifact.rename") == 1
    lineage = Lineage.read(out)
    assert lineage is not None
    assert lineage.steps[0].circumstances["processes"] == 2
    # The same training, by whomever: what is there is up to date.
    assert together.run(1, together.command, words(place, out), tmp_path / "again") == [0]
    assert not events(tmp_path / "again", 0)


@pytest.mark.parametrize(
    ("use", "flags"),
    [
        ("hidden", ["--states", "1", "--relations", "1", "--projection", "always"]),
        pytest.param(
            "lora", ["--rank", "4", "--activations", "recompute"], marks=pytest.mark.slow, id="lora"
        ),
    ],
)
def test_what_is_trained_beside_a_model_or_inside_it_is_shared_too(
    use: str, flags: list[str], place: Path, tmp_path: Path
) -> None:
    for count in (1, 2):
        given = [*words(place, tmp_path / f"by-{count}", use), *flags]
        assert together.run(count, together.command, given, tmp_path / f"{count}.log") == [0] * count
    same(tmp_path / "by-2", tmp_path / "by-1")


def test_each_process_samples_for_itself(place: Path, tmp_path: Path) -> None:
    flags = ["--share", "1", "--prompt-tokens", "4", "--max-new-tokens", "8"]
    for name in ("one", "two"):
        given = [*words(place, tmp_path / name, "on_policy"), *flags]
        assert together.run(2, together.command, given, tmp_path / f"{name}.log") == [0, 0]
    assert table(tmp_path / "one") == table(tmp_path / "two")
    assert len(table(tmp_path / "one")) == STEPS + 1


@pytest.mark.parametrize(("killed", "then"), [(0, 1), pytest.param(1, 3, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_others_and_the_run_resumes_with_another_number(
    killed: int, then: int, place: Path, alone: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "target" / "out", tmp_path / "log"
    codes = together.run(2, together.command, words(place, out), log, (killed, 8))
    other = 1 - killed
    assert codes[killed] == -signal.SIGKILL
    assert codes[other] == EnvironmentFault.exit_code
    assert "processes that train together is gone" in together.output(log, other)
    assert "goes on from the last checkpoint" in together.output(log, other)
    assert not out.exists()
    assert [path.name for path in out.parent.iterdir() if not path.name.startswith(".")] == []
    resumed = tmp_path / "resumed"
    assert together.run(then, together.command, words(place, out), resumed) == [0] * then
    same(out, alone)
    steps = [event["step"] for event in events(resumed, 0) if event["name"] == "training.step"]
    assert steps == list(range(7, STEPS + 1)), "after the last checkpoint"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_error_of_the_first_process_is_told_once(place: Path, tmp_path: Path) -> None:
    given = [*words(place, tmp_path / "out"), "--window", "128"]
    assert together.run(2, together.command, given, tmp_path / "log") == [PlanError.exit_code] * 2
    assert "longer than the 64 positions" in together.output(tmp_path / "log", 0)
    assert together.output(tmp_path / "log", 1) == ""


def test_more_processes_than_windows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: Any = build("distill.logits", {"window": 5, "batch": 2, "tokens": 10})
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    windows = torch.zeros(4, 5, dtype=torch.int64)
    text = TrainingText(windows, windows, "nothing")
    with pytest.raises(PlanError, match="3 processes cannot share the 2 windows of a step"):
        Loop(torch.nn.Linear(2, 2), None, text, numbers, Run(scratch=tmp_path))  # type: ignore[arg-type]


def test_one_process_alone_has_all_of_it() -> None:
    processes = Processes()
    assert (processes.rank, processes.count, processes.leads) == (0, 1, True)
    windows = torch.arange(12).view(4, 3)
    assert processes.share(windows).equal(windows)
    total = processes.total(Losses({"loss": torch.tensor(6.0)}, 3), ("loss",), torch.device("cpu"))
    assert total.means() == {"loss": 2.0}


def test_gradients_go_in_buckets_of_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.training.processes._BUCKET", 10)
    shapes = [(4,), (6,), (1,), (12,), (2, 2)]
    gradients = [torch.zeros(shape) for shape in shapes] + [torch.zeros(3, dtype=torch.bfloat16)]
    found = [[tuple(each.shape) for each in bucket] for bucket in _buckets(gradients)]
    assert found == [[(4,), (6,)], [(1,)], [(12,)], [(2, 2)], [(3,)]]


@pytest.mark.slow
def test_torchrun_starts_it(place: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "compress", *words(place, out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    same(out, alone)
    assert done.stdout.splitlines() == [str(out)]
