"""What one timed distillation is: the same arguments in, the same file out.

A *lesson* is a student, a teacher, tokens and the numbers of an optimisation. Every runner takes the
arguments read here, trains, and leaves in its output folder `lesson.json`: a mark before the first step and
after each, the tokens of each that are no padding, the loss of the first, memory and versions.

This file is imported inside each program's own environment, so it needs only the standard library, torch
and safetensors.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

TOKENS, LENGTHS = "input_ids", "lengths"


@dataclass(frozen=True)
class Lesson:
    """The arguments of one runner.

    Attributes:
        student, teacher: folders.
        tokens: int64 `input_ids` [rows, length]; where there are `lengths` [rows], what is behind is padding.
        held_out: the same for text that is not trained on, for who asks for it.
        batch: rows in a pass.
        accumulation: passes in a step.
        preset: a way to ask the program.
    """

    student: Path
    teacher: Path
    tokens: Path
    held_out: Path
    batch: int
    accumulation: int
    steps: int
    learning_rate: float
    preset: str
    threads: int
    out: Path


@dataclass
class Watch:
    """Takes the time of steps, and the memory of the process.

    Attributes:
        marks: seconds by the clock and of processor time, before the first step and after each.
        counts: tokens of each pass that are no padding, in the order of the passes.
        losses: of each pass, in nats a predicted token.
        loaded_bytes: of the process when both models are there and nothing is trained.
        peak_bytes: the most until the last mark.
    """

    marks: list[tuple[float, float]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    loaded_bytes: int = 0
    peak_bytes: int = 0

    def mark(self) -> None:
        if not self.marks:
            self.loaded_bytes = kernel_bytes("VmRSS")
        self.marks.append((time.perf_counter(), time.process_time()))
        self.peak_bytes = kernel_bytes("VmHWM")

    def write(self, lesson: Lesson, packages: Sequence[str]) -> None:
        """Leave the record.

        Raises:
            ValueError: there are not as many marks and passes as steps.
        """
        if len(self.marks) != lesson.steps + 1 or len(self.counts) < lesson.steps * lesson.accumulation:
            raise ValueError(f"{len(self.marks)} marks and {len(self.counts)} passes, {lesson.steps} steps")
        a_step = range(0, lesson.steps * lesson.accumulation, lesson.accumulation)
        record = {
            "marks": self.marks,
            "tokens": [sum(self.counts[at : at + lesson.accumulation]) for at in a_step],
            "first_loss": sum(self.losses[: lesson.accumulation]) / lesson.accumulation,
            "loaded_bytes": self.loaded_bytes,
            "peak_bytes": self.peak_bytes,
            "versions": {name: version(name) for name in packages},
            "lesson": {name: str(value) for name, value in asdict(lesson).items()},
        }
        (lesson.out / "lesson.json").write_text(json.dumps(record) + "\n")


def kernel_bytes(name: str) -> int:
    """A line of the kernel's account of this process: `VmRSS`, what it holds, `VmHWM`, the most it held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"the kernel does not tell {name}")


def parse_lesson(description: str, presets: Sequence[str]) -> Lesson:
    """Read the arguments that every runner shares, and keep torch to the given threads."""
    parser = argparse.ArgumentParser(description=description)
    for name in ("student", "teacher", "tokens", "held-out", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("batch", "accumulation", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--preset", choices=presets, default=presets[0])
    parser.add_argument("--threads", type=int, default=1)
    lesson = Lesson(**vars(parser.parse_args()))

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch  # after the arguments, so that --help is quick

    torch.set_num_threads(lesson.threads)
    lesson.out.mkdir(parents=True, exist_ok=True)
    return lesson
