"""A run that is killed resumes from the last finished block and ends with the same bytes."""

import json
import multiprocessing
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from tests import kill_at, models_zoo
from tests.single_steps import bytes_of

LAYERS = 4
# Imported once into a process that never computes, from which every run is forked: fresh, and in no time.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "compress.cli.app",
        "compress.engine",
        "compress.models.preflight",
        "compress.sweep.quantization",
        "compress.sweep.verification",
        "transformers.models.llama.modeling_llama",
    ]
)


@dataclass
class Crashing:
    """A model, tokens to calibrate on, and runs of a command on them."""

    folder: Path
    method: tuple[str, ...]
    runs: int = field(default=0)

    def command(self, out: Path) -> list[str]:
        return [*self.method[:2], str(self.folder / "model"), "--out", str(out), *self.method[2:]]

    def run(self, out: Path, name: str = kill_at.ANY, number: int = 0) -> tuple[int, list[dict[str, Any]]]:
        """Run to the end, or to the event; the exit code (minus the signal) and the events."""
        self.runs += 1
        log = self.folder / f"events-{self.runs}.jsonl"
        process = PROCESSES.Process(target=kill_at.run, args=(self.command(out), log, name, number))
        process.start()
        process.join()
        assert process.exitcode is not None
        if process.exitcode not in (0, -signal.SIGKILL):
            pytest.fail(log.with_suffix(".out").read_text())
        events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return process.exitcode, events


def prepare(folder: Path, *method: str) -> Crashing:
    models_zoo.build("llama", num_hidden_layers=LAYERS).save_pretrained(folder / "model")
    save_file({"input_ids": models_zoo.tokens(6, 16)}, folder / "tokens.safetensors")
    return Crashing(folder, method)


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> Crashing:
    folder = tmp_path_factory.mktemp("gptq")
    text = ["--calibration", str(folder / "tokens.safetensors"), "--samples", "6", "--sequence-length", "16"]
    options = ["--group-size", "16", "--bits", "4", "--batch-size", "2", "--threads", "1", "--device", "cpu"]
    plain = ["--clip", "none", "--refinement", "0"]
    return prepare(folder, "quantize", "gptq", *options, *plain, *text)


@pytest.fixture(scope="module")
def rtn(tmp_path_factory: pytest.TempPathFactory) -> Crashing:
    folder = tmp_path_factory.mktemp("rtn")
    options = ["--group-size", "16", "--bits", "4", "--threads", "1", "--device", "cpu"]
    return prepare(folder, "quantize", "rtn", *options)


@pytest.fixture(scope="module")
def whole(gptq: Crashing) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """What an uninterrupted run leaves, and its events."""
    out = gptq.folder / "whole"
    code, events = gptq.run(out)
    assert code == 0
    return bytes_of(out), events


def finished(events: list[dict[str, Any]]) -> set[int]:
    """Positions of the units that were finished."""
    return {event["position"] for event in events if event["name"] == "block.finish"}


def worked_on(events: list[dict[str, Any]]) -> set[int]:
    """Positions of the units that were computed."""
    return {event["position"] for event in events if event["name"] in ("block.start", "block.calibrate")}


def resumes(crashing: Crashing, out: Path, expected: dict[str, bytes], first: list[dict[str, Any]]) -> None:
    """Run again after a kill, and hold the result to the promise."""
    assert not out.exists()
    code, second = crashing.run(out)
    assert code == 0
    assert bytes_of(out) == expected
    assert worked_on(second) == set(range(LAYERS + 1)) - finished(first)
    assert {event["position"] for event in second if event["name"] == "block.resume"} == finished(first)
    if finished(first) == set(range(LAYERS + 1)):
        computing = ("block.calibrate", "layer.solve", "shard.tensor")
        assert not [event for event in second if event["name"] in computing]
    assert [path.name for path in out.parent.iterdir()] == [out.name]


# Each in the middle of the model, and for a shard in the middle of a file.
MOMENTS = [
    pytest.param("block.calibrate", 7, marks=pytest.mark.slow),
    ("layer.solve", 10),
    pytest.param("shard.tensor", 40, marks=pytest.mark.slow),
    ("artifact.rename", 1),
    pytest.param("verify.block", 3, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "number"), MOMENTS)
def test_a_killed_run_ends_with_the_same_bytes(
    gptq: Crashing,
    whole: tuple[dict[str, bytes], list[dict[str, Any]]],
    tmp_path: Path,
    name: str,
    number: int,
) -> None:
    expected, events = whole
    assert Counter(event["name"] for event in events)[name] >= number, "the moment does not come"
    out = tmp_path / "out"
    code, first = gptq.run(out, name, number)
    assert code == -signal.SIGKILL
    assert first[-1]["name"] == name
    resumes(gptq, out, expected, first)


@pytest.mark.slow
def test_a_run_killed_again_and_again_arrives(
    gptq: Crashing, whole: tuple[dict[str, bytes], list[dict[str, Any]]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done: list[dict[str, Any]] = []
    for name, number in (
        ("layer.solve", 3),
        ("shard.tensor", 12),
        ("block.calibrate", 5),
        ("verify.block", 2),
    ):
        code, events = gptq.run(out, name, number)
        assert code == -signal.SIGKILL
        assert worked_on(events).isdisjoint(finished(done))
        done += events
    resumes(gptq, out, whole[0], done)


def test_a_finished_run_does_nothing_again(
    gptq: Crashing, whole: tuple[dict[str, bytes], list[dict[str, Any]]]
) -> None:
    out = gptq.folder / "whole"
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    code, events = gptq.run(out)
    assert code == 0
    assert worked_on(events) == set()
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before
    assert bytes_of(out) == whole[0]


def test_what_stood_at_the_target_stays_until_the_new_result_is_verified(
    gptq: Crashing, whole: tuple[dict[str, bytes], list[dict[str, Any]]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert gptq.run(out)[0] == 0
    other = Crashing(gptq.folder, (*gptq.method, "--seed", "1", "--bits", "3"), gptq.runs + 1000)
    code, _ = other.run(out, "artifact.rename", 1)
    assert code == -signal.SIGKILL
    assert bytes_of(out) == whole[0]
    assert other.run(out)[0] == 0
    assert bytes_of(out) != whole[0]
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.slow
def test_a_method_without_data_resumes_too(rtn: Crashing, tmp_path: Path) -> None:
    assert rtn.run(tmp_path / "whole" / "out")[0] == 0
    out = tmp_path / "killed" / "out"
    code, first = rtn.run(out, "shard.tensor", 30)
    assert code == -signal.SIGKILL
    assert finished(first)
    resumes(rtn, out, bytes_of(tmp_path / "whole" / "out"), first)


@pytest.mark.slow
def test_a_run_may_be_killed_anywhere(
    gptq: Crashing, whole: tuple[dict[str, bytes], list[dict[str, Any]]], tmp_path: Path
) -> None:
    expected, events = whole
    # Every fifth event, and the first and the last ones, where files are made and put in place.
    for number in sorted({1, 2, 3, *range(4, len(events), 5), *range(len(events) - 8, len(events) + 1)}):
        out = tmp_path / str(number) / "out"
        code, first = gptq.run(out, kill_at.ANY, number)
        assert code == -signal.SIGKILL
        if first[-1]["name"] == "artifact.done":
            assert bytes_of(out) == expected
        else:
            resumes(gptq, out, expected, first)
