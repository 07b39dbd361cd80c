"""The timers around the programs, and what is made of their seconds."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/peers"))

import gptq_time
import regions
import run_compress
from cell import Cell
from schemes import Rounding


class Clock:
    """A processor whose time passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "thread_time", made)
    return made


def test_time_goes_to_the_innermost_region(clock: Clock) -> None:
    counted = regions.Regions()
    clock.now += 100
    with counted.within("outer"):
        clock.now += 1
        with counted.within("inner"):
            clock.now += 2
        clock.now += 4
    clock.now += 100
    with counted.within("outer"):
        clock.now += 8
    assert counted.seconds == {"outer": 13, "inner": 2}
    counted.clear()
    assert counted.seconds == {}


def test_an_error_closes_its_region(clock: Clock) -> None:
    counted = regions.Regions()

    def fail() -> None:
        with counted.within("inner"):
            clock.now += 1
            raise KeyError

    with counted.within("outer"):
        with pytest.raises(KeyError):
            fail()
        clock.now += 2
    assert counted.seconds == {"outer": 2, "inner": 1}


def test_functions_methods_and_static_methods_are_wrapped(clock: Clock) -> None:
    class Owner:
        def method(self, by: float) -> float:
            clock.now += by
            return by

        @staticmethod
        def static(by: float) -> float:
            clock.now += by
            return by

    counted = regions.Regions()
    counted.wrap(Owner, "method", "one")
    counted.wrap(Owner, "static", "two")
    assert Owner().method(by=1) == 1
    assert Owner.static(2) == Owner().static(2) == 2
    assert counted.seconds == {"one": 1, "two": 4}


def record(program: str, run: int, total: float, **held: float) -> dict[str, Any]:
    return {"program": program, "run": run, "processor_seconds": total, "seconds": total, "regions": held}


def test_ours_is_held_against_the_peer_whose_run_is_faster() -> None:
    records = [
        entry
        for run in range(3)
        for entry in (
            record("compress", run, 8, forward=4, solve=1 + run),
            record("gptqmodel", run, 20, forward=4, solve=4),
            record("llm-compressor", run, 30, forward=4, solve=1),
            record("compress-rtn", run, 10, verification=5),
            record("copy", run, 1),
        )
    ]
    found = gptq_time.ratios(records)
    assert found["rival"] == "gptqmodel"
    ours = found["ours"]["compress"]
    assert list(found["ours"]) == ["compress"]
    assert ours["solve"]["of_each_run"] == [0.25, 0.5, 0.75]
    assert (ours["solve"]["median"], ours["solve"]["verdict"]) == (0.5, "PASS")
    assert ours["everything but the forward"]["median"] == 0.25
    assert found["rtn_share_of_copy"] == pytest.approx(0.1)
    assert found["rtn_share_of_copy_unverified"] == pytest.approx(0.2)
    middle = gptq_time.medians(records)
    assert middle["compress"]["solve"] == 2
    assert middle["compress"]["rest"] == 4
    settings = {"subject": "a random Llama", "samples": 8, "length": 256, "runs": 3}
    report = {
        "settings": settings,
        "machine": {"cores": 1, "processor": "x"},
        "medians": middle,
        "ratios": found,
        "runs": [{"model_bytes": 2**30}],
    }
    assert "| compress | solve | 0.25, 0.50, 0.75 | 0.50 | 0.5 | PASS |" in gptq_time.render(report)


def test_a_limit_that_is_missed_is_said() -> None:
    records = [
        record("compress", 0, 8, forward=1, solve=3),
        record("gptqmodel", 0, 8, forward=1, solve=4),
    ]
    found = gptq_time.ratios(records)
    assert [item["verdict"] for item in found["ours"]["compress"].values()] == ["FAIL", "FAIL"]
    assert "rtn_share_of_copy" not in found


def test_the_last_step_of_a_preset_rounds() -> None:
    cell = Cell(Path("model"), None, Rounding(2, 64), "rtn", 1, Path("out"))
    command = run_compress.command_of(cell, ["quantize", "rtn"], Path("model"), Path("out"), last=True)
    text = " ".join(command[1:])
    assert text.startswith("-m compress quantize rtn model --out out --bits 2 --group-size 64")
    assert "--calibration" not in text
    first = run_compress.command_of(cell, ["transform", "x"], Path("model"), Path("out"), last=False)
    assert "--bits" not in first


def test_every_preset_of_ours_is_a_command(tmp_path: Path) -> None:
    from compress.core.passes import find

    for preset in run_compress.PRESETS.values():
        for family, method, *_ in preset.settings:
            assert find(f"{family}.{method}")
