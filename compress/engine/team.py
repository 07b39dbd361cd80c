"""One run by several processes: the first plans, writes and reports; the others help it where it trains.

A helper waits for orders. An order names a pass that trains, its source and the circumstances; all processes
then apply the pass together, each trains on its share of the windows, and the helpers are released before
anything is written (`compress.training.loop`). Orders go through the store that the launcher's processes meet
at, as JSON. How long the first process prunes or measures between two trainings does not matter.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, final

from compress.core.artifact import Artifact
from compress.core.errors import EnvironmentFault, UsageError
from compress.core.launch import LAUNCHING, Launch
from compress.core.passes import Outcome, Pass, build, name_of
from compress.core.recipe import Recipe
from compress.core.run import CalibrationSource, Run, TrainingSource
from compress.training.trainer import Trainer

_MEETING = timedelta(minutes=10)
"""How long a process waits for the others to start."""
_FAREWELL = timedelta(seconds=10)
"""How long the first process waits until the others have heard that it is over."""


def check(recipe: Recipe) -> None:
    """Refuse a recipe that several processes cannot share.

    Raises:
        UsageError: no step trains.
    """
    if not any(isinstance(step.built(), Trainer) for step in recipe.steps):
        uses = " and ".join(step.use for step in recipe.steps)
        raise UsageError(
            f"{uses} cannot be shared by several processes: nothing of it trains",
            "run it without the launcher",
        )


@final
class Team:
    """The processes of a launcher, seen from one of them.

    Args:
        here: which one this is.

    Raises:
        EnvironmentFault: the others do not come.
        UsageError: the environment does not say where they meet.
    """

    def __init__(self, here: Launch) -> None:
        from torch.distributed.rendezvous import rendezvous

        self._here = here
        self._orders = 0
        try:
            self._store, _, _ = next(iter(rendezvous("env://", timeout=_MEETING)))
        except ValueError as error:
            raise UsageError(f"a launcher is only half there: {error}", f"use one: {LAUNCHING}") from error
        except RuntimeError as error:
            raise _lost(here, error) from error

    def apply(self, method: Pass, source: Artifact, target: Path, run: Run) -> Outcome:
        """`Pass.apply`, by all processes where the pass trains; for the first of them.

        Raises:
            CompressError: what the pass raises, or a helper is gone.
        """
        if not isinstance(method, Trainer):
            return method.apply(source, target, run)
        self._say(
            {
                "use": name_of(method),
                "options": method.model_dump(mode="json"),
                "source": str(source.path),
                "target": str(target),
                "run": _spoken(run),
            }
        )
        with self._joined(run):
            return method.apply(source, target, run)

    def help(self) -> dict[str, Any]:
        """Do what the first process says until it says that the run is over; what it said last.

        Raises:
            CompressError: this process cannot go on, or another is gone.
        """
        from compress.training.processes import Released

        while True:
            order = self._next()
            if "over" in order:
                self._store.set(f"heard/{self._here.rank}", "")
                return dict(order["over"])
            run = _run_of(order["run"])
            method = build(order["use"], order["options"])
            with self._joined(run), contextlib.suppress(Released):
                method.apply(Artifact.open(Path(order["source"])), Path(order["target"]), run)

    def release(self, result: dict[str, Any]) -> None:
        """Tell the helpers that the run is over, and wait a moment until they have heard it."""
        with contextlib.suppress(RuntimeError):
            self._say({"over": result})
            self._store.wait([f"heard/{rank}" for rank in range(1, self._here.count)], _FAREWELL)

    def _say(self, order: dict[str, Any]) -> None:
        self._orders += 1
        self._store.set(f"order/{self._orders}", json.dumps(order))

    def _next(self) -> dict[str, Any]:
        from compress.training.processes import PERIOD

        self._orders += 1
        name = f"order/{self._orders}"
        try:
            while not self._store.check([name]):
                time.sleep(PERIOD)
            order: dict[str, Any] = json.loads(self._store.get(name))
        except RuntimeError as error:
            raise _lost(self._here, error) from error
        return order

    @contextlib.contextmanager
    def _joined(self, run: Run) -> Iterator[None]:
        from torch.distributed.distributed_c10d import PrefixStore

        from compress.training.processes import joined

        with joined(PrefixStore(f"group/{self._orders}", self._store), self._here, run.device, run.threads):
            yield


def _lost(here: Launch, error: RuntimeError) -> EnvironmentFault:
    return EnvironmentFault(
        f"process {here.rank} of {here.count} does not reach the others: {str(error).splitlines()[0]}",
        "see what they said; run the same command again to resume",
    )


def _spoken(run: Run) -> dict[str, Any]:
    """The circumstances as plain data; who is told of the run is the first process's own."""
    return {
        **{name: value for name, value in vars(run).items() if name not in ("reporter", "log")},
        "calibration": None if run.calibration is None else asdict(run.calibration),
        "training": None if run.training is None else asdict(run.training),
        "models": {option: str(folder) for option, folder in run.models.items()},
        "log_folder": str(run.log_folder),
        "scratch": str(run.scratch),
    }


def _run_of(spoken: dict[str, Any]) -> Run:
    calibration, training = spoken["calibration"], spoken["training"]
    return Run(
        **{
            **spoken,
            "calibration": None if calibration is None else CalibrationSource(**calibration),
            "training": None if training is None else TrainingSource(**training),
            "models": {option: Path(folder) for option, folder in spoken["models"].items()},
            "log_folder": Path(spoken["log_folder"]),
            "scratch": Path(spoken["scratch"]),
        }
    )
