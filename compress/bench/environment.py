"""On what a measurement was made: hardware and versions, so that a figure can be read a year later."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

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
        "processor": _processor(),
        "cores": os.cpu_count(),
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
            "cuda": torch.version.cuda,
        }
    return environment


def _processor() -> str:
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
