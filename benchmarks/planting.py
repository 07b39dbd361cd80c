"""A bench's worker with a fault planted in the model that it measures: slower steps, or wrong answers.

`verdicts.py` has it started in the place of ``compress.bench.worker`` for the candidate alone, as
``python benchmarks/planting.py --delay 0.05 REPLY``. The product has no part in it: the runtime is wrapped,
or the scored answers are changed, in this process, and the worker itself does all the rest.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from compress import runtimes
from compress.bench import worker
from compress.core.facts import Fact
from compress.core.measurement import Measurement
from compress.runtimes import Generation, Placement, Runtime, Session

if TYPE_CHECKING:
    from torch import Tensor

    from compress.core.artifact import Artifact
    from compress.models.tasks import Task

JUDGED = ".accuracy"
"""How the names of the quantities end whose answers are changed."""


@final
class DelayingSession(Session):
    """A session whose every prefill and decoding step takes longer, by a share of what it has just taken.

    The wait is busy, as more arithmetic would be, and proportional to the step, so that the slowdown is the
    same share whatever the machine does at that moment.
    """

    def __init__(self, session: Session, share: float) -> None:
        self._session = session
        self._share = share

    @property
    def facts(self) -> Mapping[str, Any]:
        return self._session.facts

    def outputs(self, tokens: "Tensor") -> "Tensor":
        return self._session.outputs(tokens)

    def prefill(self, tokens: "Tensor") -> Generation:
        started = time.perf_counter()
        state = self._session.prefill(tokens)
        self._delay(started)
        return state

    def decode(self, state: Generation) -> Generation:
        started = time.perf_counter()
        following = self._session.decode(state)
        self._delay(started)
        return following

    def synchronize(self) -> None:
        self._session.synchronize()

    def _delay(self, started: float) -> None:
        self._session.synchronize()
        now = time.perf_counter()
        until = now + self._share * (now - started)
        while time.perf_counter() < until:
            pass


@final
class DelayingRuntime(Runtime):
    """A runtime that hands out delaying sessions."""

    name = "delaying"
    title = "a runtime with a planted delay"
    loads = Fact.TRANSFORMERS

    def __init__(self, runtime: Runtime, share: float) -> None:
        self._runtime = runtime
        self._share = share

    def prepared(
        self, artifact: "Artifact", task: "Task", folder: Path, *, trust_remote_code: bool = False
    ) -> Path:
        return self._runtime.prepared(artifact, task, folder, trust_remote_code=trust_remote_code)

    def load(self, artifact: "Artifact", task: "Task", placement: Placement) -> Session:
        return DelayingSession(self._runtime.load(artifact, task, placement), self._share)


def changed_answers(right: Sequence[float], drop: float, changed: float, seed: int) -> tuple[list[int], int]:
    """Which answers a planted fault changes, so that accuracy falls by exactly a share of the examples.

    Args:
        right: 1 for a right answer and 0 for a wrong one, of each example.
        drop: by how much the accuracy falls.
        changed: share of the examples whose answer changes, one way or the other, at least the drop.
        seed: of the choice.

    Returns:
        The numbers of those examples, and how many of them, the first ones, were right.

    Raises:
        ValueError: the model has not so many right or wrong answers.
    """
    lost = round((changed + drop) / 2 * len(right))
    won = round((changed - drop) / 2 * len(right))
    generator = random.Random(seed)
    were_right = [number for number, sample in enumerate(right) if sample]
    were_wrong = [number for number, sample in enumerate(right) if not sample]
    return generator.sample(were_right, lost) + generator.sample(were_wrong, won), lost


def with_drop(measurement: Measurement, drop: float, changed: float, seed: int) -> Measurement:
    """The same measurement after some of its answers have changed."""
    numbers, _ = changed_answers(measurement.samples, drop, changed, seed)
    samples = list(measurement.samples)
    answers = list(measurement.answers or [""] * len(samples))
    for number in numbers:
        samples[number] = 1.0 - samples[number]
        # The number of another choice; of two choices, the other one.
        answers[number] = (
            ("1" if answers[number] == "0" else "0") if answers[number].isdecimal() else "planted"
        )
    return Measurement.sampled(
        samples,
        summary=measurement.summary,
        unit=measurement.unit,
        better=measurement.better,
        answers=answers,
        conditions=measurement.conditions,
    )


def plant_delay(share: float) -> None:
    """From now on every runtime of this process is slower."""
    found = runtimes.find
    runtimes.find = lambda name: DelayingRuntime(found(name), share)


def plant_drop(drop: float, changed: float, seed: int) -> None:
    """From now on the suites that this process scores have changed answers."""
    answer = worker.answer

    def planted(request: Mapping[str, Any], take_turn: Callable[[], None]) -> dict[str, Any]:
        document = answer(request, take_turn)
        for name, value in document.get("measurements", {}).items():
            if name.startswith("suite.") and name.endswith(JUDGED):
                found = with_drop(Measurement.model_validate(value), drop, changed, seed)
                document["measurements"][name] = found.model_dump(mode="json")
        return document

    worker.answer = planted


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--delay", type=float, default=0.0, help="share by which every step takes longer")
    parser.add_argument("--drop", type=float, default=0.0, help="by how much accuracies fall")
    parser.add_argument("--changed", type=float, default=0.0, help="share of the answers that change")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("reply")
    arguments = parser.parse_args()
    if arguments.delay:
        plant_delay(arguments.delay)
    if arguments.changed:
        plant_drop(arguments.drop, arguments.changed, arguments.seed)
    sys.argv = [sys.argv[0], arguments.reply]
    worker.main()


if __name__ == "__main__":
    main()
