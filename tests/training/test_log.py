"""Logs elsewhere: what is written, where a resumed run goes on, what is said without the package."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compress.core.errors import EnvironmentFault, PlanError
from compress.core.passes import build
from compress.core.run import Run
from compress.training import log
from compress.training.trainer import Trainer

ROWS: list[Mapping[str, float]] = [
    {"step": 0, "validation_loss": 3.0},
    {"step": 1, "tokens": 128, "learning_rate": 0.5, "gradient_norm": 2.0, "loss": 2.5},
    {
        "step": 2,
        "tokens": 256,
        "learning_rate": 0.25,
        "gradient_norm": 1.0,
        "loss": 2.0,
        "validation_loss": 1.5,
    },
]


def numbers() -> Trainer:
    built = build("distill.logits", {"window": 16})
    assert isinstance(built, Trainer)
    return built


def write(service: Any, folder: Path, step: int, rows: list[Mapping[str, float]]) -> None:
    run = Run(scratch=folder, log_folder=folder / "out")
    with log.opened(service, run, numbers(), step) as opened:
        for row in rows:
            opened.write(row)


def test_nothing_is_written_where_no_log_is_asked_for(tmp_path: Path) -> None:
    write(None, tmp_path, 0, ROWS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("service", ["tensorboard", "mlflow"])
def test_a_missing_package_is_an_error(service: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match=f"--log {service} needs {service}, not installed") as found:
        log.require(service)
    assert found.value.hint == f"pip install 'compress-models[{service}]'"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_every_step_once_also_of_a_resumed_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra [tensorboard] is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write("tensorboard", tmp_path, 0, ROWS)
    # Killed after a checkpoint of step 1.
    write("tensorboard", tmp_path, 1, ROWS[2:])
    shown = EventAccumulator(str(tmp_path / "out")).Reload()
    scalars = {
        name: [(event.step, event.value) for event in shown.Scalars(name)] for name in shown.Tags()["scalars"]
    }
    assert scalars == {
        "validation/loss": [(0, 3.0), (2, 1.5)],
        "training/loss": [(1, 2.5), (2, 2.0)],
        "optimisation/tokens": [(1, 128.0), (2, 256.0)],
        "optimisation/learning_rate": [(1, 0.5), (2, 0.25)],
        "optimisation/gradient_norm": [(1, 2.0), (2, 1.0)],
    }


class Fault(Exception):
    """As MLflow's own."""


class Stand:
    """Remembers what MLflow was told."""

    exceptions = SimpleNamespace(MlflowException=Fault)

    def __init__(self) -> None:
        self.told: list[Any] = []

    def start_run(self, *, run_id: str | None, run_name: str, nested: bool) -> Any:
        self.told.append(("start", run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "r1"))

    def log_params(self, options: Mapping[str, Any]) -> None:
        self.told.append(("options", options["window"]))

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        if metrics.get("training/loss") == 0.0:
            raise Fault("no server")
        self.told.append((step, sorted(metrics)))

    def end_run(self, status: str) -> None:
        self.told.append(("end", status))


def test_mlflow_gets_one_run_also_of_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand()
    monkeypatch.setattr(log, "require", lambda service: None)
    monkeypatch.setitem(sys.modules, "mlflow", stand)  # type: ignore[arg-type]
    write("mlflow", tmp_path, 0, ROWS[:2])
    with pytest.raises(EnvironmentFault, match="MLflow does not take the log: no server"):
        write("mlflow", tmp_path, 1, [ROWS[2], {"step": 3, "loss": 0.0}])
    columns = [
        "optimisation/gradient_norm",
        "optimisation/learning_rate",
        "optimisation/tokens",
        "training/loss",
    ]
    assert stand.told == [
        ("start", None, "out"),
        ("options", 16),
        (0, ["validation/loss"]),
        (1, columns),
        ("end", "FINISHED"),
        ("start", "r1", "out"),
        (2, [*columns, "validation/loss"]),
        ("end", "FAILED"),
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning:mlflow")
def test_mlflow_itself_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra [mlflow] is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    write("mlflow", tmp_path, 0, ROWS[:2])
    write("mlflow", tmp_path, 1, ROWS[2:])
    found = mlflow.search_runs(output_format="list")
    assert len(found) == 1
    history = mlflow.MlflowClient().get_metric_history(found[0].info.run_id, "training/loss")
    assert [(entry.step, entry.value) for entry in history] == [(1, 2.5), (2, 2.0)]
    assert found[0].data.params["window"] == "16"


def test_a_log_without_a_training_is_refused(tmp_path: Path) -> None:
    from compress import engine
    from tests import models_zoo

    model = models_zoo.write("llama", tmp_path)
    with pytest.raises(PlanError, match="no step that trains"):
        engine.run(
            {"model": str(model), "log": "tensorboard", "steps": [{"use": "quantize.rtn", "group_size": 16}]},
            tmp_path / "out",
        )
