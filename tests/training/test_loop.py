"""The loop on a model small enough to be followed: order of the data, steps, evaluation, resume."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from compress.core.errors import CalibrationError
from compress.core.passes import build
from compress.core.run import RESUMABLE, Run
from compress.data.training import TrainingText
from compress.training.loop import Batches, Loop, Trained
from compress.training.objective import Losses, Objective
from tests.dummies import Recorder
from tests.marks import slow_but

NUMBERS: dict[str, Any] = {
    "tokens": 240,
    "window": 5,
    "batch": 2,
    "accumulation": 2,
    "learning_rate": 0.05,
    "evaluate_every": 3,
    "checkpoint_every": 2,
    "warmup": 0.2,
    "weight_decay": 0.01,
}
STEPS = 12


class Table(nn.Module):
    """Next-token logits as a table, with a bias and some noise, so that the random state matters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.table = nn.Parameter(torch.randn(6, 6))
        self.bias = nn.Parameter(torch.zeros(6))


@final
class Counting(Objective):
    """Cross-entropy of the table."""

    names = ("loss",)

    def __init__(self, model: Table, noise: float = 0.1, blow_up_at: int = 0) -> None:
        self._model = model
        self._noise = noise
        self._left = blow_up_at

    def _loss(self, windows: torch.Tensor, noise: float) -> tuple[torch.Tensor, int]:
        logits = self._model.table[windows[:, :-1]] + self._model.bias
        if noise:
            logits = logits + noise * torch.randn_like(logits)
        targets = windows[:, 1:].flatten()
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum"), len(targets)

    def positions(self, windows: torch.Tensor) -> int:
        return windows.shape[0] * (windows.shape[1] - 1)

    def learn(self, windows: torch.Tensor, positions: float) -> Losses:
        loss, count = self._loss(windows, self._noise)
        self._left -= 1
        if self._left == 0:
            loss = loss * float("nan")
        (loss / positions).backward()
        return Losses({"loss": loss.detach().double()}, count)

    @torch.no_grad()
    def judge(self, windows: torch.Tensor) -> Losses:
        loss, count = self._loss(windows, 0.0)
        return Losses({"loss": loss.double()}, count)


def text() -> TrainingText:
    generator = torch.Generator().manual_seed(0)
    # Counts upwards, mostly: something that can be learned.
    start = torch.randint(6, (34, 1), generator=generator)
    windows = (start + torch.arange(5)) % 6
    return TrainingText(windows[:30], windows[30:], "counting")


class Stop(Exception):
    """A crash."""


class Crashing(Recorder):
    """Raises at one event."""

    def __init__(self, name: str = "", number: int = 0) -> None:
        super().__init__()
        self._name = name
        self._left = number

    def event(self, name: str, **facts: object) -> None:
        super().event(name, **facts)
        if name == self._name:
            self._left -= 1
            if self._left == 0:
                raise Stop


def train(
    scratch: Path,
    reporter: Recorder | None = None,
    blow_up_at: int = 0,
    read: TrainingText | None = None,
    **changes: Any,
) -> tuple[Table, Trained]:
    model = Table()
    scratch.mkdir(parents=True, exist_ok=True)
    numbers: Any = build("distill.logits", {**NUMBERS, **changes})
    run = Run(seed=3, scratch=scratch, reporter=reporter or Recorder())
    loop = Loop(model, Counting(model, blow_up_at=blow_up_at), read or text(), numbers, run)
    return model, loop.train()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Table, Trained]:
    return train(tmp_path_factory.mktemp("whole"))


def test_every_window_is_seen_before_any_is_seen_again() -> None:
    windows = torch.arange(10)[:, None].expand(10, 3)
    batches = Batches(windows, 4, seed=0)
    seen = torch.cat([batches.of(step)[:, 0] for step in range(5)]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert Batches(windows, 4, seed=0).of(3).equal(batches.of(3)), "whenever a step is asked for"
    assert not Batches(windows, 4, seed=1).of(0).equal(batches.of(0))


def test_it_learns_and_says_how(tmp_path: Path) -> None:
    recorder = Recorder()
    _, trained = train(tmp_path, recorder)
    history = trained.history
    assert trained.steps == STEPS
    assert [row["step"] for row in history.rows] == list(range(STEPS + 1))
    assert history.rows[-1]["tokens"] == 240
    assert history.evaluation(trained.best)["loss"] < history.evaluation(0)["loss"]
    assert [step for step in range(STEPS + 1) if history.evaluation(step)] == [0, 3, 6, 9, 12]
    assert recorder.count("training.step") == STEPS
    assert ("begin", {"title": "training", "total": 240, "unit": "token"}) in recorder.events
    notes = [facts["text"] for name, facts in recorder.events if name == "progress.note"]
    assert len(notes) == STEPS
    assert str(notes[2]).startswith("loss ")
    assert ", validation " in str(notes[2])
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == sorted(
        [RESUMABLE, f"checkpoint-{STEPS:08d}", *(path.name for path in tmp_path.glob("best-*"))]
    )


def test_a_step_is_that_of_adamw_over_the_mean_loss(tmp_path: Path) -> None:
    """One step, written down: clipping at 1, decay for the matrix alone, the rate of the schedule."""
    model = Table()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    numbers: Any = build("distill.logits", {**NUMBERS, "tokens": 20, "warmup": 0.0, "keep": "last"})
    loss = Counting(model, noise=0.0)
    Loop(model, loss, text(), numbers, Run(seed=3, scratch=tmp_path)).train()
    table = before["table"].clone().requires_grad_()
    bias = before["bias"].clone().requires_grad_()
    windows = Batches(text().windows, 4, seed=3).of(0)
    logits = (table[windows[:, :-1]] + bias).flatten(0, 1)
    nn.functional.cross_entropy(logits, windows[:, 1:].flatten()).backward()
    assert table.grad is not None
    assert bias.grad is not None
    norm = torch.sqrt(table.grad.square().sum() + bias.grad.square().sum())
    scale = min(1.0, 1.0 / float(norm + 1e-6))
    for weight, gradient, decay in ((before["table"], table.grad, 0.01), (before["bias"], bias.grad, 0.0)):
        gradient = gradient * scale
        # In the first step both moments, made up for their start, are the gradient and its square.
        wanted = weight * (1 - 0.05 * decay) - 0.05 * gradient / (gradient.abs() + 1e-8)
        found = model.table if decay else model.bias
        torch.testing.assert_close(found.detach(), wanted)


MOMENTS = [
    *(("training.step", number) for number in (1, 3, 12)),
    *(("training.evaluate", number) for number in (1, 2, 5)),
    *(("checkpoint.write", number) for number in range(1, 7)),
    *(("checkpoint.tensor", number) for number in (2, 6, 11, 20)),
    *(("checkpoint.finish", number) for number in range(1, 7)),
]


@pytest.mark.parametrize(
    ("name", "number", "keep"),
    slow_but(
        [*((*moment, "best") for moment in MOMENTS[::2]), *((*moment, "last") for moment in MOMENTS[1::6])],
        [(*moment, keep) for moment in MOMENTS for keep in ("best", "last")],
    ),
)
def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(
    name: str, number: int, keep: str, whole: tuple[Table, Trained], tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        train(tmp_path, Crashing(name, number), keep=keep)
    recorder = Recorder()
    model, trained = train(tmp_path, recorder, keep=keep)
    expected, undisturbed = whole
    assert trained.history.csv() == undisturbed.history.csv()
    assert trained.best == undisturbed.best
    if keep == "best":
        assert trained.kept == undisturbed.kept
        for wanted, found in zip(expected.parameters(), model.parameters(), strict=True):
            assert torch.equal(wanted, found)
    done = [facts["step"] for event, facts in recorder.events if event == "training.step"]
    resumed = [facts["step"] for event, facts in recorder.events if event == "training.resume"]
    first = resumed[0] if resumed else 0
    assert done == list(range(int(str(first)) + 1, STEPS + 1)), "nothing twice, nothing left out"


@pytest.mark.parametrize("zeros", ["keep", "train"])
def test_zeros_of_a_pruned_matrix_stay_or_are_trained(
    zeros: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = torch.rand(6, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    plain = Table.__init__

    def prune(self: Table) -> None:
        plain(self)
        with torch.no_grad():
            self.table[pruned] = 0.0

    monkeypatch.setattr(Table, "__init__", prune)
    with pytest.raises(Stop):
        train(tmp_path, Crashing("training.step", 8), zeros=zeros, weight_decay=0.1)
    model, trained = train(tmp_path, zeros=zeros, weight_decay=0.1)
    assert model.table[pruned].eq(0).all() == (zeros == "keep")
    assert trained.zeros == (int(pruned.sum()) if zeros == "keep" else 0)
    assert model.table[~pruned].ne(0).all()
    assert model.bias.ne(0).all(), "a bias starts at zero and learns"


def test_the_best_weights_are_kept_or_the_last(tmp_path: Path) -> None:
    # So large a rate does harm after some steps.
    wild = {"learning_rate": 3.0, "clip": 0, "floor": 1.0, "tokens": 400}
    best, trained = train(tmp_path / "best", keep="best", **wild)
    last, other = train(tmp_path / "last", keep="last", **wild)
    assert 0 < trained.kept < trained.steps, "the numbers of this test make it worse in the end"
    assert (other.kept, other.best) == (20, trained.best)
    with torch.no_grad():
        losses = [Counting(model).judge(text().held_out).means()["loss"] for model in (best, last)]
    assert losses[0] == trained.history.evaluation(trained.best)["loss"]
    assert losses[1] == trained.history.evaluation(20)["loss"]


def test_a_training_that_does_only_harm_says_so(tmp_path: Path) -> None:
    backwards = replace(text(), held_out=text().held_out.flip(1))
    _, trained = train(tmp_path, read=backwards, evaluate_every=STEPS)
    assert trained.best == trained.kept == 0


def test_a_loss_that_is_no_number_is_an_error_and_progress_stays(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="diverged in step 4: loss nan"):
        train(tmp_path, blow_up_at=7)
    assert (tmp_path / RESUMABLE).is_file()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000002"]


def test_checkpoints_come_by_time_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 40))
    monkeypatch.setattr("compress.training.loop.time.monotonic", lambda: float(next(clock)))
    recorder = Recorder()
    train(tmp_path, recorder, checkpoint_every="100s")
    steps = [facts["step"] for name, facts in recorder.events if name == "checkpoint.finish"]
    assert len(steps) > 1
    assert steps[-1] == STEPS


def test_a_checkpoint_is_no_pickle_and_holds_all(tmp_path: Path) -> None:
    train(tmp_path)
    folder = tmp_path / f"checkpoint-{STEPS:08d}"
    assert sorted(path.name for path in folder.iterdir()) == [
        "history.csv",
        "optimiser.safetensors",
        "state.json",
        "weights.safetensors",
    ]
    assert set(load_file(folder / "weights.safetensors")) == {"table", "bias"}
    moments = load_file(folder / "optimiser.safetensors")
    assert set(moments) == {
        f"{name}:{key}" for name in ("table", "bias") for key in ("step", "exp_avg", "exp_avg_sq")
    }
    shutil.rmtree(tmp_path)


def test_patience_ends_a_training_that_gets_no_better(tmp_path: Path) -> None:
    # So large a rate does harm after some steps.
    wild = {"learning_rate": 3.0, "clip": 0, "floor": 1.0, "tokens": 400, "evaluate_every": 1, "patience": 3}
    recorder = Recorder()
    best, trained = train(tmp_path / "whole", recorder, **wild)
    assert 0 < trained.best == trained.kept == trained.steps - 3
    assert trained.steps < 20
    assert any(f"stopped after step {trained.steps} of 20" in message for message in recorder.messages)
    with torch.no_grad():
        loss = Counting(best).judge(text().held_out).means()["loss"]
    assert loss == trained.history.evaluation(trained.best)["loss"]
    # Killed while the last checkpoint is written, and after it.
    for name, number in (("training.step", trained.steps), ("checkpoint.finish", (trained.steps + 1) // 2)):
        scratch = tmp_path / name
        with pytest.raises(Stop):
            train(scratch, Crashing(name, number), **wild)
        _, resumed = train(scratch, **wild)
        assert resumed.history.csv() == trained.history.csv()
        assert (resumed.best, resumed.kept, resumed.steps) == (trained.best, trained.kept, trained.steps)
    _, patient = train(tmp_path / "patient", **{**wild, "patience": 1000})
    assert patient.steps == 20


def test_the_weights_of_the_last_step_are_kept_where_patience_ended_it(tmp_path: Path) -> None:
    wild = {"learning_rate": 3.0, "clip": 0, "floor": 1.0, "tokens": 400, "evaluate_every": 1, "patience": 2}
    last, trained = train(tmp_path, keep="last", **wild)
    assert trained.kept == trained.steps == trained.best + 2
    with torch.no_grad():
        loss = Counting(last).judge(text().held_out).means()["loss"]
    assert loss == trained.history.evaluation(trained.steps)["loss"]


def test_every_step_draws_for_itself(tmp_path: Path) -> None:
    """What one step drew has no say in the next, so that nothing of it needs to be kept."""
    _, trained = train(tmp_path / "one")
    plain = Counting._loss

    def wasteful(self: Counting, windows: torch.Tensor, noise: float) -> tuple[torch.Tensor, int]:
        found = plain(self, windows, noise)
        torch.rand(3)
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Counting, "_loss", wasteful)
        _, other = train(tmp_path / "two", accumulation=1, batch=4)
        _, again = train(tmp_path / "three", accumulation=1, batch=4)
    assert other.history.csv() == again.history.csv()
    assert trained.history.rows[1]["loss"] != trained.history.rows[2]["loss"]


def test_what_is_trained_beside_the_model_learns_and_is_resumed(tmp_path: Path) -> None:
    """Its zeros are no pruned weights, and a checkpoint holds it."""

    def trained(folder: Path, reporter: Recorder) -> torch.Tensor:
        model, beside = nn.Linear(2, 2), Table()
        with torch.no_grad():
            beside.table.fill_diagonal_(0.0)
        numbers: Any = build("distill.logits", NUMBERS)
        run = Run(seed=3, scratch=folder, reporter=reporter)
        Loop(model, Counting(beside), text(), numbers, run, beside).train()
        return beside.table.detach()

    whole = trained(tmp_path / "whole", Recorder())
    assert (whole.diagonal() != 0).all()
    with pytest.raises(Stop):
        trained(tmp_path / "parts", Crashing("training.step", 7))
    assert torch.equal(trained(tmp_path / "parts", Recorder()), whole)
