"""Timed metrics: how much work is counted, what a shortened output is, what memory is read."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import pytest
import torch

from compress.bench import host
from compress.bench.bandwidth import Probe
from compress.bench.clock import Clock, Timing
from compress.bench.material import Material
from compress.bench.metrics import Subject, find
from compress.bench.metrics.memory import host_memory
from compress.bench.nvml import Gpu, Tenants, open_gpu
from compress.core.artifact import Artifact
from compress.core.bench import Bench
from compress.models.tasks import TASKS, Task
from compress.runtimes import Generation, Session
from tests import models_zoo
from tests.fake_nvml import UUID, FakeNvml


@final
class Counting(Session):
    """Counts its work; writes fewer tokens than it is asked for from some step on."""

    def __init__(
        self, gives_up_after: int = 10**6, step_bytes: int | None = None, device: str = "cpu"
    ) -> None:
        self.prefills = self.decodes = self.encoded = 0
        self.gives_up_after = gives_up_after
        self.step_bytes = step_bytes
        self.device = device

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"weight_bytes": 123, "device": self.device, "step_bytes": self.step_bytes}

    def outputs(self, tokens: torch.Tensor) -> torch.Tensor:
        self.encoded += tokens.shape[0]
        return torch.zeros(tokens.shape[0], 2)

    def prefill(self, tokens: torch.Tensor) -> Generation:
        self.prefills += 1
        return Generation(tokens[:, -1], None, tokens.shape[1])

    def decode(self, state: Generation) -> Generation:
        self.decodes += 1
        stays = self.decodes > self.gives_up_after
        return Generation(state.tokens, None, state.length + (0 if stays else 1))

    def synchronize(self) -> None:
        pass


def subject(session: Session, folder: Path, task: str = "text-generation") -> Subject:
    work: Task = TASKS[task]
    return Subject(
        artifact=Artifact.open(models_zoo.write("llama", folder)),
        task=work,
        options=Bench(repeats=4, sample_seconds=0, launch_seconds=0, new_tokens=5),
        session=session,
        material=Material((), None, torch.zeros(2, 7, dtype=torch.int64), {}),
        load_seconds=1.5,
        baseline={"resident": 0},
    )


def test_prefill_and_decode_are_apart_and_warmed_up(tmp_path: Path) -> None:
    session = Counting()
    given = subject(session, tmp_path)
    prefill = find("prefill").measure(given)["prefill.tokens_per_second"]
    assert (session.prefills, session.decodes) == (5, 0)
    assert len(prefill.samples) == 4
    assert prefill.conditions == {"batch": 2, "prompt": 7}
    decode = find("decode").measure(given)["decode.tokens_per_second"]
    assert session.decodes == 5 * 5
    assert decode.conditions == {"batch": 2, "prompt": 7, "new": 5}
    assert decode.better == "higher"


def test_a_sample_lasts_as_long_as_it_should(tmp_path: Path) -> None:
    short, long = Timing(0.2), Timing(0.7)
    before = Timing(0.3)  # of an iteration that wakes the caches up and does not count
    clock = Fixed(short, *[before, short, short, short] * 2, *[before, long] * 2)
    options = Bench(repeats=4, sample_seconds=0.5, launch_seconds=0, new_tokens=5)
    given = replace(subject(Counting(), tmp_path), clock=clock, options=options)
    decode = find("decode").measure(given)["decode.tokens_per_second"]
    assert decode.samples == pytest.approx((10 / 0.2, 10 / 0.2, 10 / 0.7, 10 / 0.7))


def test_each_sample_is_a_turn_and_long_iterations_need_no_waking(tmp_path: Path) -> None:
    turns: list[int] = []
    session = Counting()
    options = Bench(repeats=3, sample_seconds=0.1, launch_seconds=0, new_tokens=5)
    given = replace(
        subject(session, tmp_path),
        clock=Fixed(*[Timing(0.2)] * 4),
        options=options,
        take_turn=lambda: turns.append(session.prefills),
    )
    find("prefill").measure(given)
    assert turns == [0, 1, 2, 3]


@pytest.mark.parametrize(("seconds", "samples"), [(0.01, 30), (0.2, 15), (0.5, 6), (2.0, 3), (0.02, 30)])
def test_short_samples_are_taken_more_often(tmp_path: Path, seconds: float, samples: int) -> None:
    options = Bench(repeats=3, sample_seconds=0.1, launch_seconds=3.0, new_tokens=5)
    given = replace(subject(Counting(), tmp_path), clock=Fixed(*[Timing(seconds)] * 1_000), options=options)
    assert len(find("decode").measure(given)["decode.tokens_per_second"].samples) == samples


def test_a_shortened_output_is_no_speed(tmp_path: Path) -> None:
    given = subject(Counting(gives_up_after=8), tmp_path)
    decode = find("decode").measure(given)["decode.tokens_per_second"]
    assert decode.invalid
    assert decode.distrust == {0: "a shortened output: 6 instead of 10 (token/s)"}
    assert len(decode.samples) == 1


@final
class Fixed(Clock):
    """Says what it was told to."""

    def __init__(self, *timings: Timing) -> None:
        self._timings = iter(timings)

    def time(self, session: Session, work: Any) -> tuple[Timing, Any]:
        return next(self._timings), work()


@pytest.mark.parametrize(
    ("name", "task"), [("prefill", ""), ("decode", ""), ("encode", "feature-extraction")]
)
def test_clocks_that_disagree_once_make_a_launch_invalid(tmp_path: Path, name: str, task: str) -> None:
    rate = find(name).quantities[0].name
    right, wrong = Timing(2.0, 1.99), Timing(0.1, 2.0)
    given = subject(Counting(), tmp_path, task or "text-generation")
    clocked = replace(given, clock=Fixed(right, right, right, right, right))
    assert find(name).measure(clocked)[rate].value is not None
    assert clocked.observed[rate] == {"wall_seconds": [2.0] * 4, "device_seconds": [1.99] * 4}
    found = find(name).measure(replace(given, clock=Fixed(right, right, wrong, right, right)))[rate]
    assert found.invalid
    assert found.distrust[0].startswith("clock disagreement: 100 ms by the wall clock, 2e+03 ms by CUDA")
    assert len(found.samples) == 4


def decoding(tmp_path: Path, session: Session, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> Subject:
    """Decoding on a machine with a cache of 1 kB that copies 1 GB/s."""
    monkeypatch.setattr(host, "cache_bytes", lambda: 1_000)
    monkeypatch.setattr(Probe, "measure", lambda self: 1e9)
    clock = Fixed(*[Timing(0.1)] * 10)
    probe = Probe("cpu", clock, session)
    return replace(subject(session, tmp_path), clock=clock, probe=probe, **changed)


def test_the_share_of_the_bandwidth_that_decoding_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Counting(step_bytes=10_000_000)
    given = decoding(tmp_path, session, monkeypatch)
    found = find("decode").measure(given)
    # 5 steps in 0.1 s, each of which reads the weights once for both sequences.
    assert found["decode.tokens_per_second"].value == pytest.approx(100)
    assert found["decode.bandwidth_share"].value == pytest.approx(50 * 10_000_000 / 1e9)
    assert given.observed == {"copy_bytes_per_second": 1e9}
    further = find("decode:3x4").measure(decoding(tmp_path / "2", session, monkeypatch))
    assert further["decode.3x4.bandwidth_share"].value == pytest.approx(0.5)


def test_a_rate_that_memory_cannot_give_is_invalid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Counting(step_bytes=50_000_000)
    found = find("decode").measure(decoding(tmp_path, session, monkeypatch))
    assert found["decode.tokens_per_second"].invalid
    assert "above the physical limit" in str(found["decode.tokens_per_second"].reason)
    assert found["decode.bandwidth_share"].samples == pytest.approx([2.5] * 4)


@pytest.mark.parametrize(("step_bytes", "reason"), [(None, "not known"), (3_000, "memory is no limit")])
def test_without_a_limit_there_is_no_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_bytes: int | None, reason: str
) -> None:
    found = find("decode").measure(decoding(tmp_path, Counting(step_bytes=step_bytes), monkeypatch))
    assert found["decode.tokens_per_second"].value is not None
    assert reason in str(found["decode.bandwidth_share"].reason)


def test_encoding_counts_sequences(tmp_path: Path) -> None:
    session = Counting()
    found = find("encode").measure(subject(session, tmp_path, "feature-extraction"))
    assert session.encoded == 2 * 5
    assert len(found["encode.sequences_per_second"].samples) == 4


def test_load_time_is_one_sample(tmp_path: Path) -> None:
    assert find("load").measure(subject(Counting(), tmp_path))["load.seconds"].samples == (1.5,)


def test_memory_is_read_after_decoding(tmp_path: Path) -> None:
    session = Counting()
    found = find("memory").measure(subject(session, tmp_path))
    assert (session.prefills, session.decodes) == (1, 5)
    assert found["memory.weight_bytes"].value == 123
    assert found["memory.device_allocated_bytes"].reason == "the model does not run on a GPU"


def test_the_memory_of_a_gpu_as_torch_and_the_driver_count_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statistics = {
        "allocated_bytes.all.peak": 20,
        "reserved_bytes.all.peak": 30,
        "allocated_bytes.all.current": 1,
    }
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: statistics)
    library = FakeNvml()
    gpu = open_gpu(UUID, library)
    assert isinstance(gpu, Gpu)
    given = replace(
        subject(Counting(device="cuda:0"), tmp_path), tenants=Tenants(gpu, 5, 4, parent_holds=False)
    )
    library.processes[5] = 500
    found = find("memory").measure(given)
    assert found["memory.device_allocated_bytes"].value == 20
    assert found["memory.device_reserved_bytes"].value == 30
    assert found["memory.device_process_bytes"].value == 500
    unasked = find("memory").measure(replace(given, tenants="nvidia-ml-py is not installed"))
    assert unasked["memory.device_process_bytes"].reason == "nvidia-ml-py is not installed"
    assert unasked["memory.device_allocated_bytes"].value == 20


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system keeps no such account")
def test_the_system_s_account() -> None:
    memory = host_memory()
    assert memory["peak"] >= memory["resident"] > 2**20
    assert memory["anonymous"] + memory["file_backed"] <= memory["resident"]
