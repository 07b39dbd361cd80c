"""What one measured compression is: the same arguments in, the same two files out.

A *cell* is one program, one of its presets, one draw of calibration tokens and one scheme. Every
runner takes the arguments read here and leaves in its output folder

- `dense.safetensors`: each weight that it changed as float32, by its Hugging Face parameter name;
- `run.json`: settings, versions, seconds, peak memory.

This file is imported inside each program's own environment, so it needs only the standard
library, torch, safetensors and transformers. The clock starts when it is imported: import it first.
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
from typing import Any

from schemes import Rounding, Scheme, Zeros, parse_scheme

STARTED = time.perf_counter()

MEBIBYTE_IN_KIBIBYTES = 1024


@dataclass(frozen=True)
class Preset:
    """One way in which a program is asked to quantize or prune.

    Attributes:
        method: what it does, in a word that the programs share (`gptq`, `rtn`).
        settings: its options, in whatever form its runner takes; JSON.
        standard: whether the table of methods takes it: the program's own choice for this method.
        calibrated: whether it reads calibration tokens; one that does not is run once, not once a draw.
        symmetric: whether zero is the integer 0; like is compared with like.
    """

    method: str
    settings: Any = field(default_factory=dict)
    standard: bool = False
    calibrated: bool = True
    symmetric: bool = True


@dataclass(frozen=True)
class Cell:
    """The arguments of one runner."""

    model: Path
    calibration: Path | None
    scheme: Scheme
    preset: str
    threads: int
    out: Path

    def draw(self) -> Path:
        """The file of calibration tokens.

        Raises:
            ValueError: none was given, and the preset needs one.
        """
        if self.calibration is None:
            raise ValueError(f"preset {self.preset} is calibrated: give --calibration")
        return self.calibration

    @property
    def rounding(self) -> Rounding:
        """The scheme of what quantizes.

        Raises:
            ValueError: zeros are asked for.
        """
        if not isinstance(self.scheme, Rounding):
            raise ValueError(f"preset {self.preset} rounds: expected BITS/GROUP, got {self.scheme}")
        return self.scheme

    @property
    def zeros(self) -> Zeros:
        """The scheme of what prunes.

        Raises:
            ValueError: bits are asked for.
        """
        if not isinstance(self.scheme, Zeros):
            raise ValueError(f"preset {self.preset} prunes: expected a share or pattern, got {self.scheme}")
        return self.scheme


@dataclass
class Clock:
    """Seconds spent under `measure`, by the clock and of processor time, and what the work took in all.

    Processor time hardly changes when other work shares the machine, so it is the one to compare. What
    comes after `finish`, the check of what was saved, counts for nothing.
    """

    seconds: float = 0.0
    processor_seconds: float = 0.0
    process_seconds: float = 0.0
    process_processor_seconds: float = 0.0
    peak_memory_mebibytes: float = 0.0

    @contextmanager
    def measure(self) -> Iterator[None]:
        started, busy = time.perf_counter(), processor_seconds()
        yield
        self.seconds += time.perf_counter() - started
        self.processor_seconds += processor_seconds() - busy

    def finish(self, *, of_children: bool = False) -> None:
        """Note what the process has taken until now; with `of_children` the memory is that of children."""
        who = resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF
        self.process_seconds = time.perf_counter() - STARTED
        self.process_processor_seconds = processor_seconds()
        self.peak_memory_mebibytes = resource.getrusage(who).ru_maxrss / MEBIBYTE_IN_KIBIBYTES


def processor_seconds() -> float:
    """User and system time so far, of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def parse_cell(description: str, presets: Mapping[str, Preset]) -> Cell:
    """Read the arguments that every runner shares, and keep torch to the given threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--calibration", type=Path, help="draw-SEED.safetensors, for a calibrated preset")
    parser.add_argument("--scheme", type=parse_scheme, required=True, help="3/128, 50%% or 2:4")
    parser.add_argument("--preset", choices=sorted(presets), default="default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    cell = Cell(**vars(parser.parse_args()))

    import torch  # after the arguments, so that --help is quick

    torch.set_num_threads(cell.threads)
    cell.out.mkdir(parents=True, exist_ok=True)
    return cell


def writes_text(model: Path) -> bool:
    """Whether a model folder holds a language model with its head, by the class that its config names."""
    architectures = json.loads((model / "config.json").read_text())["architectures"]
    return str(architectures[0]).endswith("ForCausalLM")


def automatic_class(model: Path) -> Any:
    """The class of transformers that loads the folder: with a language model's head, or an encoder."""
    from transformers import AutoModel, AutoModelForCausalLM

    return AutoModelForCausalLM if writes_text(model) else AutoModel


def write_cell(
    cell: Cell,
    dense: "Mapping[str, object]",
    *,
    settings: object,
    clock: Clock,
    packages: tuple[str, ...],
    source: str,
    compared_with: str,
) -> None:
    """Write the two files of a cell.

    `source` says what the dense weights were read from and `compared_with` what they were found
    equal to.
    """
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, tensor in dense.items():
        if not isinstance(tensor, torch.Tensor) or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: not a tensor of finite numbers")
        tensors[name] = tensor.to(torch.float32).contiguous()
    save_file(tensors, cell.out / "dense.safetensors")
    record = {
        "preset": cell.preset,
        "settings": settings,
        "scheme": str(cell.scheme),
        "calibration": cell.calibration.name if cell.calibration else None,
        "changed_weights": len(tensors),
        "source": source,
        "compared_with": compared_with,
        "quantization_seconds": clock.seconds,
        "quantization_processor_seconds": clock.processor_seconds,
        "process_seconds": clock.process_seconds,
        "process_processor_seconds": clock.process_processor_seconds,
        "peak_memory_mebibytes": clock.peak_memory_mebibytes,
        "threads": cell.threads,
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in packages},
        "machine": {"processor": platform.machine(), "cores": len(os.sched_getaffinity(0))},
    }
    (cell.out / "run.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
