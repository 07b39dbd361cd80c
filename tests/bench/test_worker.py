"""The measured process: what it watches, and how it marks what it measured."""

import os
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.bench import host, worker
from compress.bench.material import prepare
from compress.bench.nvml import Gpu, Tenants
from compress.core.artifact import Artifact
from compress.core.bench import Bench
from compress.core.measurement import Measurement
from compress.data.corpora import documents
from compress.models.tasks import TASKS
from tests.fake_nvml import UUID, FakeNvml

Request = Callable[..., dict[str, Any]]


@pytest.fixture
def request_of(before: Path, text: Path, tmp_path: Path) -> Request:
    """A request for a stage, as the experiment makes it."""

    def made(stage: str, *metrics: str) -> dict[str, Any]:
        options = Bench(
            repeats=2, sample_seconds=0, launch_seconds=0, prompt_length=8, new_tokens=2, tokens=64
        )
        task = TASKS["text-generation"]
        file = tmp_path / "material.safetensors"
        prepare(Artifact.open(before), task, documents(str(text)), options).save(file)
        return {
            "artifact": str(before),
            "runtime": "torch-eager",
            "task": task.name,
            "stage": stage,
            "metrics": list(metrics),
            "device": "cpu",
            "gpu": None,
            "threads": torch.get_num_threads(),
            "options": options.model_dump(mode="json"),
            "material": str(file),
        }

    return made


def test_a_launch_that_was_held_back_is_marked_whole(
    request_of: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_thermal", lambda root, cores: None)
    seconds = count(step=1_000_000)
    monkeypatch.setattr(host, "_throttled", lambda root: float(next(seconds)))
    reply = worker.answer(request_of("timing", "load", "decode"))
    (reason,) = reply["launch"]["distrust"]
    assert reason.startswith("throttled: a quota on processors held it back")
    assert reply["launch"]["conditions"]["throttled_seconds"] == 1_000_000
    found = {name: Measurement.model_validate(value) for name, value in reply["measurements"].items()}
    assert found["load.seconds"].distrust == {0: reason}
    assert found["decode.tokens_per_second"].invalid
    assert len(found["decode.tokens_per_second"].samples) == 2
    # What there is no value for has nothing to be doubted.
    assert not found["decode.bandwidth_share"].invalid


def test_only_timed_launches_are_watched(request_of: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "read", lambda: pytest.fail("nothing is to be watched"))
    reply = worker.answer(request_of("memory", "memory"))
    assert "launch" not in reply
    assert reply["measurements"]["memory.weight_bytes"]["value"] > 0
    assert reply["facts"]["step_bytes"] < reply["facts"]["weight_bytes"]


def test_the_gpu_of_a_request_is_opened_before_anything_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", library)
    library.processes = {os.getppid(): 3, 4711: 4}
    gpu, tenants = worker._gpu({"device": "cuda", "gpu": {"uuid": UUID, "shared": True}})
    assert isinstance(gpu, Gpu)
    assert isinstance(tenants, Tenants)
    assert tenants.foreign == {4711}
    assert worker._gpu({"device": "cpu"}) == (None, "the model does not run on a GPU")
    unnamed = "the request does not name the GPU"
    assert worker._gpu({"device": "cuda", "gpu": None}) == (unnamed, unnamed)
