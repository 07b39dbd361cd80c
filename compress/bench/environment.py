"""On what a measurement was made: hardware and versions, so that a figure can be read a year later."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from compress.bench import host
from compress.bench.nvml import open_gpu

_LIBRARIES: Final = (
    "torch",
    "transformers",
    "compressed-tensors",
    "tokenizers",
    "safetensors",
    "scipy",
    "numpy",
)


def describe(device: str, threads: int) -> dict[str, Any]:
    """Hardware, system and library versions.

    Args:
        device: where the models run.
        threads: of their arithmetic.
    """
    import psutil
    import torch

    environment: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "cache_bytes": host.cache_bytes(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": threads,
        "device": device,
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        environment["gpu"] = {
            "name": properties.name,
            "uuid": str(properties.uuid),
            "memory_bytes": properties.total_memory,
            "cache_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }
        gpu = open_gpu(str(properties.uuid))
        environment["gpu"] |= {"unwatched": gpu} if isinstance(gpu, str) else gpu.described()
    return environment


def holds_context(index: int = 0) -> bool:
    """Whether this process has a context on a GPU: it is then listed among those that compute there."""
    import torch

    # torch says it by no public name; asking for the device's memory would make a context.
    return torch.cuda.is_initialized() and bool(
        torch._C._cuda_hasPrimaryContext(index)  # type: ignore[attr-defined]
    )


def processor() -> str:
    """What the processor calls itself."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
