"""Two clocks around a region: the same within a share, or a disagreement."""

from typing import Any

import pytest

from compress.bench.clock import CudaClock, Timing, WallClock, clock_of
from compress.core.artifact import Artifact
from compress.models.tasks import TASKS
from compress.runtimes import Placement, find
from tests import models_zoo


class Recording:
    """A session and its events, which write down what is asked of them."""

    def __init__(self, milliseconds: float = 0.0) -> None:
        self.calls: list[str] = []
        self.milliseconds = milliseconds
        self.facts: dict[str, Any] = {"device": "cuda:0"}

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def event(self) -> "Recording.Event":
        return Recording.Event(self)

    class Event:
        def __init__(self, owner: "Recording") -> None:
            self.owner = owner

        def record(self) -> None:
            self.owner.calls.append("record")

        def synchronize(self) -> None:
            self.owner.calls.append("wait")

        def elapsed_time(self, other: "Recording.Event") -> float:
            return self.owner.milliseconds


def work(calls: list[str]) -> str:
    calls.append("work")
    return "result"


def test_a_processor_has_the_wall_clock_alone(tmp_path: Any) -> None:
    session = Recording()
    timing, result = WallClock().time(session, lambda: work(session.calls))  # type: ignore[arg-type]
    assert (result, timing.device_seconds, timing.disagreement) == ("result", None, None)
    assert session.calls == ["synchronize", "work", "synchronize"]
    artifact = Artifact.open(models_zoo.write("llama", tmp_path))
    running = find("torch-eager").load(artifact, TASKS["text-generation"], Placement())
    assert isinstance(clock_of(running), WallClock)


def test_events_enclose_the_work_inside_of_the_synchronised_region() -> None:
    session = Recording(milliseconds=3.0)
    timing, result = CudaClock(session.event).time(session, lambda: work(session.calls))  # type: ignore[arg-type]
    assert result == "result"
    assert timing.device_seconds == pytest.approx(3e-3)
    assert session.calls == ["synchronize", "record", "work", "record", "synchronize", "wait"]
    assert isinstance(clock_of(session), CudaClock)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wall", "device", "agree"),
    [
        (1.0, 0.96, True),
        (1.0, 0.94, False),
        (1.0, 1.06, False),
        (1e-3, 0.85e-3, True),
        (1e-3, 0.7e-3, False),
        # Handed over and not waited for: the wall clock saw a fraction of the work.
        (1e-3, 50e-3, False),
    ],
)
def test_clocks_agree_within_a_share_and_a_slack(wall: float, device: float, agree: bool) -> None:
    said = Timing(wall, device).disagreement
    assert (said is None) is agree
    if said is not None:
        assert said.startswith("clock disagreement: ")
