"""Checkpoints: complete or not there, and no more of them than are needed."""

from pathlib import Path

import pytest
import torch

from compress.core.run import RESUMABLE
from compress.training.checkpoints import Checkpoints, Position
from compress.training.history import History
from tests.dummies import Recorder


class Fixture:
    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.parameters = {
            "a.b": torch.nn.Parameter(torch.randn(3, 2)),
            "c": torch.nn.Parameter(torch.randn(4)),
        }
        self.optimiser = torch.optim.AdamW(self.parameters.values(), 0.1)
        self.recorder = Recorder()
        self.checkpoints = Checkpoints(folder, self.parameters, self.optimiser, self.recorder)
        self.history = History(("loss",))
        self.history.judged(0, {"loss": 1.0})

    def step(self, number: int = 1) -> None:
        generator = torch.Generator().manual_seed(number)
        for weight in self.parameters.values():
            weight.grad = torch.randn(weight.shape, generator=generator)
        self.optimiser.step()

    def position(self, step: int, best: int = 0) -> Position:
        return Position(step, best, self.history)

    def values(self) -> list[torch.Tensor]:
        return [weight.detach().clone() for weight in self.parameters.values()]


def test_weights_and_moments_come_back(tmp_path: Path) -> None:
    first = Fixture(tmp_path)
    assert first.checkpoints.restore(("loss",)) is None
    first.step()
    first.checkpoints.save(first.position(1))
    first.step(2)
    second = Fixture(tmp_path)
    position = second.checkpoints.restore(("loss",))
    assert position is not None
    assert (position.step, position.best, position.history) == (1, 0, first.history)
    second.step(2)
    for wanted, found in zip(first.values(), second.values(), strict=True):
        assert torch.equal(wanted, found)


def test_only_what_is_needed_stays(tmp_path: Path) -> None:
    made = Fixture(tmp_path)
    made.checkpoints.save_best(1)
    made.checkpoints.save(made.position(2, best=1))
    made.checkpoints.save_best(3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best-00000001.safetensors",
        "best-00000003.safetensors",
        "checkpoint-00000002",
        RESUMABLE,
    ], "the checkpoint still refers to the first"
    made.checkpoints.save(made.position(4, best=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best-00000003.safetensors",
        "checkpoint-00000004",
        RESUMABLE,
    ]
    before = made.values()
    made.checkpoints.save_best(3)
    made.step()
    made.checkpoints.load_best(3)
    assert all(torch.equal(wanted, found) for wanted, found in zip(before, made.values(), strict=True))


def test_a_checkpoint_that_was_not_finished_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Fixture(tmp_path)
    made.checkpoints.save(made.position(1))
    wanted = made.values()
    made.step()

    def fail(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", lambda self, _: fail(self))
        with pytest.raises(OSError, match="No space"):
            made.checkpoints.save(made.position(2))
    position = made.checkpoints.restore(("loss",))
    assert position is not None
    assert position.step == 1
    assert all(torch.equal(one, two) for one, two in zip(wanted, made.values(), strict=True))
    made.checkpoints.save(made.position(2))
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-00000002"]
