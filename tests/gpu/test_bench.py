"""On a GPU: the clocks agree, memory is counted three ways, and a neighbour is seen."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compress.bench.bandwidth import Probe
from compress.bench.clock import clock_of
from compress.bench.experiment import compare
from compress.bench.nvml import Gpu, Tenants, open_gpu
from compress.bench.results import Results
from compress.core.artifact import Artifact
from compress.models.tasks import resolve
from compress.runtimes import Placement, Session, find
from tests import models_zoo, quantized_models

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

HOLDS_A_CONTEXT = """
import sys
import torch

held = torch.ones(1, device="cuda")
print("there", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def neighbour() -> Iterator[None]:
    """Another process with a context on the GPU."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_CONTEXT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.communicate()


def running(tmp_path: Path) -> Session:
    artifact = Artifact.open(models_zoo.write("llama", tmp_path))
    return find("torch-eager").load(artifact, resolve("auto", artifact.config), Placement("cuda"))


def test_events_agree_with_the_wall_clock_around_synchronised_work(tmp_path: Path) -> None:
    session = running(tmp_path)
    clock = clock_of(session)
    factor = torch.randn(4096, 4096, device="cuda")

    def work() -> torch.Tensor:
        product = factor
        for _ in range(20):
            product = product @ factor
        return product

    clock.time(session, work)
    timing, _ = clock.time(session, work)
    assert timing.device_seconds is not None
    assert timing.disagreement is None


def test_a_copy_is_as_fast_as_a_gpu_s_memory(tmp_path: Path) -> None:
    session = running(tmp_path)
    probe = Probe("cuda:0", clock_of(session), session)
    assert probe.copy_bandwidth > 50e9
    assert (probe.cache_bytes or 0) > 2**20


def experiment(tmp_path: Path) -> Results:
    folder = models_zoo.write("llama", tmp_path)
    before = quantized_models.add_tokenizer(folder, models_zoo.VOCABULARY)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    options = {
        "device": "cuda",
        "launches": 2,
        "repeats": 2,
        "prompt_length": 8,
        "new_tokens": 16,
        "tokens": 256,
        "noise_floor": False,
        "budget": 0,
    }
    return compare(before, [before], tmp_path / "out", str(text), options=options)


def test_an_experiment_sees_the_gpu(tmp_path: Path) -> None:
    pytest.importorskip("pynvml")
    found = experiment(tmp_path)
    gpu = found.environment["gpu"]
    assert "driver" in gpu
    for arm in found.arms:
        assert arm.faults == ()
        measured = arm.measurements
        allocated = measured["memory.device_allocated_bytes"].value
        reserved = measured["memory.device_reserved_bytes"].value
        assert allocated is not None
        assert reserved is not None
        assert allocated <= reserved
        process = measured["memory.device_process_bytes"]
        assert process.reason is not None or (process.value or 0) >= reserved
        for launch in arm.launches:
            seconds = launch.conditions["decode.tokens_per_second"]
            assert len(seconds["wall_seconds"]) == len(seconds["device_seconds"]) == 2
            assert "slowdowns" in launch.conditions["gpu"]


def test_a_neighbour_makes_launches_invalid(tmp_path: Path, neighbour: None) -> None:
    pytest.importorskip("pynvml")
    gpu = open_gpu(str(torch.cuda.get_device_properties(0).uuid))
    if isinstance(gpu, str) or not gpu.processes():
        pytest.skip("NVML lists no processes of the GPU here")
    assert isinstance(gpu, Gpu)
    assert Tenants(gpu, 0, 0, parent_holds=False).foreign
    found = experiment(tmp_path)
    for arm in found.arms:
        assert arm.measurements["decode.tokens_per_second"].invalid
