"""The progress of a training shown elsewhere while it runs: on TensorBoard, or in MLflow.

Nothing is kept there that is not in the table of the result (`compress.training.csv`). Both packages are
extras. A run that was interrupted goes on in the same log: TensorBoard is told to forget what came after the
last checkpoint, MLflow's run is taken up under its number, which lies beside the checkpoints.
"""

import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

from compress.core.errors import EnvironmentFault
from compress.core.run import LogService, Run
from compress.training.history import COLUMNS, VALIDATION
from compress.training.trainer import Trainer

_MLFLOW_RUN = "mlflow.run"


class Log(ABC):
    """Gets the rows of a history, one a step."""

    @abstractmethod
    def write(self, row: Mapping[str, float]) -> None:
        """Show what a step measured."""


@final
class Nowhere(Log):
    """No log was asked for."""

    def write(self, row: Mapping[str, float]) -> None:
        """Show nothing."""


@final
class TensorBoard(Log):
    """Scalars in the event files of TensorBoard's own writer.

    Args:
        writer: `torch.utils.tensorboard.SummaryWriter`.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, row: Mapping[str, float]) -> None:
        """One scalar a column."""
        for name, value in _grouped(row).items():
            self._writer.add_scalar(name, value, int(row["step"]))


@final
class MLflow(Log):
    """Metrics of an MLflow run.

    Args:
        mlflow: the module.
    """

    def __init__(self, mlflow: Any) -> None:
        self._mlflow = mlflow

    def write(self, row: Mapping[str, float]) -> None:
        """All columns in one call.

        Raises:
            EnvironmentFault: its server does not take them.
        """
        with _of_mlflow(self._mlflow):
            self._mlflow.log_metrics(_grouped(row), step=int(row["step"]))


def require(service: LogService | None) -> None:
    """Refuse a log whose package is not installed.

    Raises:
        EnvironmentFault: it is not.
    """
    if service is not None and importlib.util.find_spec(service) is None:
        raise EnvironmentFault(
            f"--log {service} needs {service}, not installed here",
            f"pip install 'compress-models[{service}]'",
        )


@contextmanager
def opened(service: LogService | None, run: Run, numbers: Trainer, step: int) -> Iterator[Log]:
    """The log that was asked for, closed at the end.

    Args:
        service: which one, or none.
        run: names its folder and that of the progress.
        numbers: the options, shown once.
        step: after which the training goes on.

    Raises:
        EnvironmentFault: its package is not installed, or its server does not answer.
    """
    require(service)
    options = numbers.model_dump(mode="json")
    if service == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier run wrote of the steps to come is forgotten.
        with SummaryWriter(str(run.log_folder), purge_step=step + 1 if step else 0) as writer:
            writer.add_text("options", f"```json\n{json.dumps(options, indent=1)}\n```")
            yield TensorBoard(writer)
    elif service == "mlflow":
        mlflow = importlib.import_module("mlflow")
        note = run.scratch / _MLFLOW_RUN
        known = note.read_text(encoding="ascii") if step and note.is_file() else None
        with _of_mlflow(mlflow):
            begun = mlflow.start_run(run_id=known, run_name=run.log_folder.name, nested=True)
            note.write_text(begun.info.run_id, encoding="ascii")
            if known is None:
                mlflow.log_params(options)
        status = "FAILED"
        try:
            yield MLflow(mlflow)
            status = "FINISHED"
        finally:
            mlflow.end_run(status)
    else:
        yield Nowhere()


@contextmanager
def _of_mlflow(mlflow: Any) -> Iterator[None]:
    try:
        yield
    except mlflow.exceptions.MlflowException as error:
        raise EnvironmentFault(
            f"MLflow does not take the log: {error}", "is MLFLOW_TRACKING_URI right? or leave --log out"
        ) from error


def _grouped(row: Mapping[str, float]) -> dict[str, float]:
    """The columns of a row under names that both show in groups."""
    named = {}
    for name, value in row.items():
        if name == "step":
            continue
        if name.startswith(VALIDATION):
            named[f"validation/{name.removeprefix(VALIDATION)}"] = value
        else:
            named[f"{'optimisation' if name in COLUMNS else 'training'}/{name}"] = value
    return named
