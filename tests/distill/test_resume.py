"""A distillation that is killed, at whatever moment, goes on to the same losses and the same bytes."""

import json
import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compress import engine
from compress.core.artifact import TRAINING_FILE
from compress.core.errors import EnvironmentFault
from compress.core.recipe import Recipe
from tests import kill_at, models_zoo
from tests.dummies import Recorder
from tests.single_steps import bytes_of

STEPS = 7
# Imported once into a process that never computes, from which every run is forked.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["compress.cli.app", "compress.engine", "compress.runtimes.torch_eager", "compress.training.loop"]
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    models_zoo.write("gemma2", folder / "teacher", seed=1)
    models_zoo.write("gemma2", folder / "student", seed=2, dtype=torch.bfloat16)
    save_file({"input_ids": models_zoo.tokens(20, 16)}, folder / "tokens.safetensors")
    return folder


def words(place: Path, out: Path) -> list[str]:
    given = {
        "--teacher": place / "teacher" / "gemma2",
        "--train": place / "tokens.safetensors",
        "--out": out,
        "--tokens": STEPS * 128,
        "--window": 16,
        "--batch": 4,
        "--accumulation": 2,
        "--evaluate-every": 2,
        "--checkpoint-every": 2,
        "--learning-rate": "3e-3",
        "--precision": "float32",
        "--threads": 1,
        "--device": "cpu",
    }
    flags = [str(word) for pair in given.items() for word in pair]
    return ["distill", "logits", str(place / "student" / "gemma2"), *flags]


def run(place: Path, out: Path, log: Path, name: str = kill_at.ANY, number: int = 0) -> list[dict[str, Any]]:
    """Run to the end, or until the event; what was told."""
    process = PROCESSES.Process(target=kill_at.run, args=(words(place, out), log, name, number))
    process.start()
    process.join()
    if process.exitcode != (-signal.SIGKILL if number else 0):
        pytest.fail(log.with_suffix(".out").read_text())
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, bytes]:
    run(place, place / "whole", place / "whole.jsonl")
    return bytes_of(place / "whole")


@pytest.mark.parametrize(
    ("name", "number", "resumed"),
    [
        pytest.param("training.step", 2, 0, marks=pytest.mark.slow),
        ("checkpoint.finish", 1, 2),
        pytest.param("checkpoint.tensor", 50, 0, marks=pytest.mark.slow),
        pytest.param("training.step", 6, 4, marks=pytest.mark.slow),
        pytest.param("checkpoint.finish", 3, 6, marks=pytest.mark.slow),
        ("shard.tensor", 5, STEPS),
        pytest.param("verify.block", 2, STEPS, marks=pytest.mark.slow),
        pytest.param("artifact.rename", 1, STEPS, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_same_losses_and_bytes(
    name: str, number: int, resumed: int, place: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "target" / "out"
    run(place, out, tmp_path / "first.jsonl", name, number)
    assert not out.exists()
    events = run(place, out, tmp_path / "second.jsonl")
    found = bytes_of(out)
    assert found[TRAINING_FILE] == whole[TRAINING_FILE]
    assert found == whole
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    steps = [event["step"] for event in events if event["name"] == "training.step"]
    assert steps == list(range(resumed + 1, STEPS + 1))


def failing(place: Path, out: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> Recipe:
    """Run until a full disk, after so many checkpoints; the recipe."""
    from compress.training import checkpoints

    recipe = Recipe.of(
        {
            "model": str(place / "student" / "gemma2"),
            "threads": 1,
            "device": "cpu",
            "data": {"train": str(place / "tokens.safetensors")},
            "steps": [
                {
                    "use": "distill.logits",
                    "teacher": str(place / "teacher" / "gemma2"),
                    "tokens": 256,
                    "window": 16,
                    "batch": 4,
                    "checkpoint_every": 1,
                    "keep": "last",
                    "precision": "float32",
                }
            ],
        }
    )
    real, calls = checkpoints.Checkpoints.save, []

    def save(self: Any, position: Any) -> None:
        calls.append(position)
        if len(calls) > after:
            raise OSError(28, "No space left on device", str(out))
        real(self, position)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.Checkpoints, "save", save)
        with pytest.raises(EnvironmentFault, match="No space left"):
            engine.run(recipe, out, single=True)
    return recipe


def test_a_full_disk_costs_what_came_after_the_last_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = failing(place, tmp_path / "out", monkeypatch, after=2)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    recorder = Recorder()
    engine.run(recipe, tmp_path / "out", single=True, reporter=recorder)
    assert recorder.count("training.step") == 2
    assert any("taking up an interrupted run" in message for message in recorder.messages)


def test_an_error_before_the_first_checkpoint_leaves_nothing_behind(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(place, tmp_path / "out", monkeypatch, after=0)
    assert list(tmp_path.iterdir()) == []
