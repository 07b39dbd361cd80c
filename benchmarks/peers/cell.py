"""What one measured quantization is: the same arguments in, the same two files out.

A *cell* is one program, one of its presets, one draw of calibration tokens and one width of
bits. Every runner takes the arguments read here and leaves in its output folder

- `dense.safetensors`: each quantized weight as float32, by its Hugging Face parameter name;
- `run.json`: settings, versions, seconds, peak memory.

This file is imported inside each program's own environment, so it needs only the standard
library, torch and safetensors. The clock starts when it is imported: import it first.
"""

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

STARTED = time.perf_counter()

MEBIBYTE_IN_KIBIBYTES = 1024


@dataclass(frozen=True)
class Cell:
    """The arguments of one runner."""

    model: Path
    calibration: Path
    bits: int
    group_size: int
    preset: str
    threads: int
    out: Path


@dataclass
class Clock:
    """Seconds spent under `measure`: by the clock, and of processor time.

    The second hardly changes when other work shares the machine, so it is the one to compare.
    """

    seconds: float = field(default=0.0)
    processor_seconds: float = field(default=0.0)

    @contextmanager
    def measure(self) -> Iterator[None]:
        started, busy = time.perf_counter(), processor_seconds()
        yield
        self.seconds += time.perf_counter() - started
        self.processor_seconds += processor_seconds() - busy


def processor_seconds() -> float:
    """User and system time so far, of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def parse_cell(description: str, presets: Mapping[str, object]) -> Cell:
    """Read the arguments that every runner shares, and keep torch to the given threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--calibration", type=Path, required=True, help="draw-SEED.safetensors")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--preset", choices=sorted(presets), default="default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    cell = Cell(**vars(parser.parse_args()))

    import torch  # after the arguments, so that --help is quick

    torch.set_num_threads(cell.threads)
    cell.out.mkdir(parents=True, exist_ok=True)
    return cell


def write_cell(
    cell: Cell,
    dense: "Mapping[str, object]",
    *,
    settings: object,
    clock: Clock,
    packages: tuple[str, ...],
    source: str,
    compared_with: str,
    of_children: bool = False,
) -> None:
    """Write the two files of a cell.

    `source` says what the dense weights were read from and `compared_with` what they were found
    equal to. With `of_children` the peak memory is that of the processes which this one started.
    """
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, tensor in dense.items():
        if not isinstance(tensor, torch.Tensor) or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: not a tensor of finite numbers")
        tensors[name] = tensor.to(torch.float32).contiguous()
    save_file(tensors, cell.out / "dense.safetensors")
    who = resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF
    record = {
        "preset": cell.preset,
        "settings": settings,
        "bits": cell.bits,
        "group_size": cell.group_size,
        "calibration": cell.calibration.name,
        "quantized_weights": len(tensors),
        "source": source,
        "compared_with": compared_with,
        "quantization_seconds": clock.seconds,
        "quantization_processor_seconds": clock.processor_seconds,
        "process_seconds": time.perf_counter() - STARTED,
        "process_processor_seconds": processor_seconds(),
        "peak_memory_mebibytes": resource.getrusage(who).ru_maxrss / MEBIBYTE_IN_KIBIBYTES,
        "threads": cell.threads,
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in packages},
        "machine": {"processor": platform.machine(), "cores": len(os.sched_getaffinity(0))},
    }
    (cell.out / "run.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
