"""On what a measurement was made."""

from types import SimpleNamespace

import pytest
import torch

from compress.bench import environment
from compress.bench.nvml import Gpu
from tests.fake_nvml import UUID, FakeNvml


def test_a_processor() -> None:
    found = environment.describe("cpu", 3)
    assert found["threads"] == 3
    assert found["libraries"]["torch"] == torch.__version__
    assert "gpu" not in found


@pytest.mark.parametrize("reason", [None, "nvidia-ml-py is not installed"])
def test_a_gpu_as_torch_and_the_driver_describe_it(
    monkeypatch: pytest.MonkeyPatch, reason: str | None
) -> None:
    properties = SimpleNamespace(name="H200", uuid=UUID, total_memory=141, L2_cache_size=60)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    asked: list[str] = []

    def opened(uuid: str) -> Gpu | str:
        asked.append(uuid)
        return reason or Gpu(FakeNvml(), "handle")

    monkeypatch.setattr(environment, "open_gpu", opened)
    found = environment.describe("cuda", 1)["gpu"]
    assert asked == [UUID]
    assert (found["name"], found["uuid"], found["cache_bytes"]) == ("H200", UUID, 60)
    if reason is None:
        assert (found["driver"], found["power_limit_watts"]) == ("580.1", 700.0)
    else:
        assert found["unwatched"] == reason


def test_a_process_that_never_used_a_gpu_holds_no_context() -> None:
    if torch.cuda.is_initialized():
        pytest.skip("something else in this process uses a GPU")
    assert environment.holds_context() is False
