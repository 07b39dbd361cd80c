"""One cell of our own methods, through the command line that users have.

A preset is a list of commands; each but the first reads what the one before it wrote, and the last
one rounds or prunes. The dense weights are read from the folder that it wrote, compressed-tensors or
plain, by the same lines that read llm-compressor's. They must equal what stock transformers computes
with after loading that folder.

Seconds of the work are those from the first block's beginning to the last block's end, reading and
writing among them, and not the imports, the plan and the verification.
"""

from cell import Cell, Clock, Preset, automatic_class, parse_cell, write_cell  # first: it starts the clock

# ruff: isort: split
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from calibration import read_draw
from dequantize import changed_floats, compressed_tensors, require_equal
from schemes import Scheme, Zeros

REPOSITORY = Path(__file__).resolve().parents[2]

PLAIN = ["quantize", "gptq", "--clip", "none", "--no-signed-scales", "--refinement", "0"]
BEST = ["quantize", "autoround", "--descent", "scaled"]
"""What the comparison of our best method with the peers' best takes; chosen before any verdict is drawn."""

PRESETS: dict[str, Preset] = {
    "default": Preset("gptq", [["quantize", "gptq"]], standard=True),
    "plain": Preset("gptq", [PLAIN]),
    "rtn": Preset("rtn", [["quantize", "rtn"]], standard=True, calibrated=False),
    "hqq": Preset("hqq", [["quantize", "hqq"]], standard=True, calibrated=False),
    "hqq-asymmetric": Preset(
        "hqq", [["quantize", "hqq", "--no-symmetric"]], standard=True, calibrated=False, symmetric=False
    ),
    "awq": Preset("awq", [["quantize", "awq"]], standard=True),
    "autoround": Preset("autoround", [["quantize", "autoround"]], standard=True),
    "best": Preset("best", [BEST], standard=True),
    "wanda": Preset("wanda", [["prune", "wanda"]]),
    "sparsegpt": Preset("sparsegpt", [["prune", "sparsegpt"]]),
    "sparsegpt-plain": Preset("sparsegpt", [["prune", "sparsegpt", "--refinement", "0"]]),
}


class Stopwatch:
    """Follows a command by its events: when its first block begins and when its last one ends."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        import psutil

        self._process = psutil.Process(process.pid)
        self._first: tuple[float, float] | None = None
        self._last: tuple[float, float] | None = None

    def see(self, event: str) -> None:
        if event == "block.start" and self._first is None:
            self._first = self._now()
        elif event == "block.finish":
            self._last = self._now()

    def add_to(self, clock: Clock) -> None:
        if self._first is None or self._last is None:
            raise ValueError("the command treated no block")
        clock.seconds += self._last[0] - self._first[0]
        clock.processor_seconds += self._last[1] - self._first[1]

    def _now(self) -> tuple[float, float]:
        times = self._process.cpu_times()
        return time.perf_counter(), times.user + times.system


def options_of(scheme: Scheme) -> list[str]:
    """The options that ask for a scheme."""
    if not isinstance(scheme, Zeros):
        return ["--bits", str(scheme.bits), "--group-size", str(scheme.group_size)]
    if scheme.pattern is None:
        return ["--sparsity", str(scheme.share)]
    return ["--pattern", str(scheme)]


def command_of(cell: Cell, words: list[str], source: Path, target: Path, *, last: bool) -> list[str]:
    """The command line of one step."""
    command = [sys.executable, "-m", "compress", *words, str(source), "--out", str(target)]
    if PRESETS[cell.preset].calibrated:
        samples, length = read_draw(cell.draw()).shape
        command += ["--calibration", str(cell.draw())]
        command += ["--samples", str(samples), "--sequence-length", str(length)]
    if last:
        command += options_of(cell.scheme)
    return [*command, "--threads", str(cell.threads), "--json"]


def run_command(command: list[str], clock: Clock) -> None:
    """Run one step with the package of this repository, also where another one is installed."""
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY))
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        watch = Stopwatch(process)
        for line in process.stdout or ():
            event: dict[str, Any] = json.loads(line)
            watch.see(event["event"])
            if event["event"] != "shard.tensor":
                print(line, end="")
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    watch.add_to(clock)


def run(cell: Cell, clock: Clock) -> Path:
    """All steps of the preset; returns the folder of the last one."""
    steps: list[list[str]] = PRESETS[cell.preset].settings
    source = cell.model
    for index, words in enumerate(steps):
        last = index == len(steps) - 1
        target = cell.out / ("saved" if last else f"step-{index}")
        shutil.rmtree(target, ignore_errors=True)
        run_command(command_of(cell, words, source, target, last=last), clock)
        source = target
    return source


def main() -> None:
    cell = parse_cell((__doc__ or "").splitlines()[0], PRESETS)
    clock = Clock()
    saved = run(cell, clock)
    clock.finish(of_children=True)

    dense = changed_floats(saved, cell.model)
    source = "the float weights of the saved folder"
    options: dict[str, Any] = {}
    if not isinstance(cell.scheme, Zeros):
        from transformers.utils.quantization_config import CompressedTensorsConfig

        dense |= compressed_tensors(saved, cell.scheme.bits, cell.scheme.group_size)
        source = "compressed-tensors pack-quantized, read from disk in float32"
        options = {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
    loaded = automatic_class(cell.model).from_pretrained(saved, **options)
    called = "the weights that stock transformers loads"
    require_equal(dense, loaded.state_dict(), loaded.dtype, called)
    write_cell(
        cell,
        dense,
        settings=PRESETS[cell.preset].settings,
        clock=clock,
        packages=("compressed-tensors", "transformers", "torch"),
        source=source,
        compared_with=f"{called} ({loaded.dtype}), equal",
    )


if __name__ == "__main__":
    main()
