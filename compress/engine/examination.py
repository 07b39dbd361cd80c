"""What this machine has, what each optional package adds, and what is missing for what.

Nothing is installed, downloaded or measured; what cannot be seen is said.
"""

import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Final, Literal, final

DISTRIBUTION: Final = "compress-models"

EXTRAS: Final[Mapping[str, str]] = {
    "hub": "data sets of the hub as texts for calibration, training and measuring",
    "suites": "ROUGE, BLEU and the word error rate of suites with written answers",
    "lm-eval": "tasks of lm-evaluation-harness by name, as suites",
    "onnx": "export to ONNX, and ONNX Runtime on processors",
    "onnx-gpu": "the same with ONNX Runtime for NVIDIA's GPUs, in place of the extra onnx",
    "bitsandbytes": "8 and 4 bits in the formats of bitsandbytes",
    "peft": "low-rank adapters: compress distill lora",
    "tensorboard": "the progress of a training on TensorBoard: --log tensorboard",
    "mlflow": "the progress of a training in MLflow: --log mlflow",
    "plot": "pictures of analyses: compress analyze sensitivity --plot FILE",
    "gguf": "export to GGUF, for llama.cpp",
    "gpu": "what a GPU says of its clocks, its memory and who else is on it",
}
"""What each extra adds; ``dev`` is for those who work on compress itself."""

State = Literal["ok", "absent", "wrong"]


@final
@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        subject: what.
        state: whether it is there; ``wrong`` is there and cannot be used, or must be there and is not.
        found: what was found, or why there is nothing.
        serves: what it is for.
        remedy: what to do where it is wanted; empty where there is nothing to do.
    """

    subject: str
    state: State
    found: str
    serves: str = ""
    remedy: str = ""


def examine() -> dict[str, list[Finding]]:
    """Everything, by chapter."""
    return {
        "machine": list(_machine()),
        "packages": list(_packages()),
        "extras": list(_extras()),
        "runtimes": list(_runtimes()),
        "measuring": list(_measuring()),
    }


def _machine() -> Iterator[Finding]:
    import psutil
    import torch

    from compress.bench import host
    from compress.bench.environment import processor

    usable, memory = host.processors(), psutil.virtual_memory()
    yield Finding("python", "ok", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    yield Finding("processor", "ok", f"{processor()}, {usable} usable cores", "threads of arithmetic")
    free = host.free_bytes()
    yield Finding(
        "memory",
        "ok",
        f"{_gib(free)} free of {_gib(memory.total)}",
        "one block of a model and its activations; whole models while measuring",
    )
    disk = shutil.disk_usage(Path.cwd())
    yield Finding("disk", "ok", f"{_gib(disk.free)} free here", "a folder for each step of a recipe")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            found = f"{device.name}, {_gib(device.total_memory)}, CUDA {torch.version.cuda}"
            yield Finding(f"GPU {index}", "ok", found, "--device cuda")
        return
    built = torch.version.cuda
    found = "torch is built without CUDA" if built is None else f"torch sees no device (CUDA {built})"
    remedy = "install a CUDA build of torch" if built is None else "check the driver and CUDA_VISIBLE_DEVICES"
    yield Finding("GPU", "absent", found, "--device cuda; everything works without", remedy)


def _packages() -> Iterator[Finding]:
    for requirement in _required(None):
        name, specifier, present = requirement
        fits = present is not None and specifier.contains(present, prereleases=True)
        yield Finding(
            name,
            "ok" if fits else "wrong",
            present or "not installed",
            f"wanted: {specifier}" if str(specifier) else "",
            "" if fits else f"pip install '{name}{specifier}'",
        )


def _extras() -> Iterator[Finding]:
    for extra, adds in EXTRAS.items():
        parts = list(_required(extra))
        lacking = [
            name
            for name, specifier, present in parts
            if present is None or not specifier.contains(present, prereleases=True)
        ]
        remedy = f"pip install '{DISTRIBUTION}[{extra}]'"
        if not parts:
            yield Finding(extra, "absent", "an older version is installed, without this extra", adds, remedy)
        elif not lacking:
            found = ", ".join(f"{name} {present}" for name, _, present in parts)
            yield Finding(extra, "ok", found, adds)
        else:
            yield Finding(extra, "absent", f"without {', '.join(lacking)}", adds, remedy)


def _runtimes() -> Iterator[Finding]:
    from compress import runtimes

    for name in runtimes.names():
        try:
            runtime = runtimes.find(name)
        except ImportError as error:
            missing = error.name or str(error)
            yield Finding(name, "absent", f"{missing} is not installed", f"bench --runtime {name}")
            continue
        yield Finding(name, "ok", runtime.title, f"bench --runtime {name}")


def _measuring() -> Iterator[Finding]:
    from compress.bench import cgroup, host

    counters = host.read()
    for subject, value, serves in (
        ("quota", counters.throttled, "launches that a quota on processors held back are not trusted"),
        ("heat", counters.thermal, "launches on hot processors are not trusted"),
        ("stolen time", counters.stolen, "what the host of a virtual machine took is noted"),
    ):
        yield Finding(
            subject,
            "absent" if value is None else "ok",
            "not counted on this system" if value is None else "counted",
            serves,
        )
    obstacle = cgroup.obstacle()
    yield Finding(
        "memory cgroup",
        "ok" if obstacle is None else "absent",
        obstacle or "one may be made",
        "memory.cgroup_peak_bytes: what a container would need",
        "" if obstacle is None else "run as a user who may make cgroups, or read memory.peak_bytes instead",
    )


def _required(extra: str | None) -> Iterator[tuple[str, Any, str | None]]:
    """Name, versions that fit, and the installed version of what we, or an extra of ours, require."""
    from packaging.requirements import Requirement

    for line in _requirements():
        requirement = Requirement(line)
        marker = requirement.marker
        alone = marker is None or marker.evaluate({"extra": ""})
        if alone if extra is None else not alone and marker is not None and marker.evaluate({"extra": extra}):
            yield requirement.name, requirement.specifier, _installed(requirement.name)


def _requirements() -> Sequence[str]:
    try:
        return requires(DISTRIBUTION) or ()
    except PackageNotFoundError:
        # Run from a checkout that was never installed: what is wanted is then not on record.
        return ()


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
