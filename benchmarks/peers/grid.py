"""A grid of cells: each run in its program's own environment, scored and kept.

What is finished is kept. A cell is done again when its scripts, its inputs or the program's versions
have changed, and not because a file is absent. `arms.py` reads what was measured.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from calibration import write_draws
from cell import Preset
from safetensors import safe_open
from schemes import Scheme
from scoring import Windows, score
from transformers import PreTrainedModel

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
OURS = "compress"
RUNNERS_SHARE = ("cell.py", "calibration.py", "dequantize.py", "schemes.py")
SCORER_FILES = ("scoring.py",)


def this_machine() -> dict[str, Any]:
    """What a table was made on, for its report."""
    return {
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


SCORED_TOGETHER = 8  # cells that share one computation of the base's probabilities
DATA_FREE = "no-draw"


@dataclass(frozen=True)
class Program:
    """One program: its runner, what the runner can do, and the environment that it runs in."""

    runner: str
    presets: Mapping[str, Preset]
    python: Path


@dataclass(frozen=True)
class Cell:
    """One program's preset at one scheme on one draw; `None` is no draw, of a method without data."""

    program: str
    preset: str
    scheme: Scheme
    seed: int | None

    @property
    def name(self) -> str:
        draw = DATA_FREE if self.seed is None else f"draw-{self.seed}"
        return f"{self.program}/{self.preset}/{self.scheme.folder}/{draw}"


@dataclass
class Grid:
    """Where everything is, for one model.

    Attributes:
        programs: by name; ours is `OURS`.
        model: folder of the base model.
        draws: folder of calibration tokens.
        results: folder of finished cells.
        threads: that every program may use.
        patience: how many seconds a cell may take.
    """

    programs: Mapping[str, Program]
    model: Path
    draws: Path
    results: Path
    threads: int
    patience: float = 7200.0
    _digests: dict[str, str] = field(default_factory=dict)

    def folder(self, cell: Cell) -> Path:
        return self.results / cell.name

    def preset(self, cell: Cell) -> Preset:
        return self.programs[cell.program].presets[cell.preset]

    def draw(self, cell: Cell) -> Path:
        return self.draws / f"draw-{cell.seed}.safetensors"

    def program_digest(self, name: str) -> str:
        """What decides a program's numbers: its runner, its environment, and for ours its source."""
        if name not in self._digests:
            program = self.programs[name]
            files = [HERE / file for file in (program.runner, *RUNNERS_SHARE)]
            if name == OURS:
                files += sorted((REPOSITORY / "compress").rglob("*.py"))
            self._digests[name] = digest_value([digest_files(files), installed_versions(program.python)])
        return self._digests[name]

    def inputs(self, cell: Cell) -> str:
        """What a cell was asked for: model, tokens, scheme and settings, whatever did it."""
        model = self._digests.setdefault("", digest_files(model_files(self.model)))
        draw = "" if cell.seed is None else digest_files([self.draw(cell)])
        scheme = list(cell.scheme.record.values())
        return digest_value([self.preset(cell).settings, model, draw, scheme, self.threads])

    def key(self, cell: Cell) -> str:
        """What a finished cell is known by: what it was asked for, and what did it."""
        return digest_value([self.program_digest(cell.program), self.inputs(cell)])


def digest_files(files: Iterable[Path]) -> str:
    """One digest of the contents of files, in the given order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def digest_value(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_tensor(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def model_files(model: Path) -> list[Path]:
    return sorted(path for path in model.iterdir() if path.is_file())


def installed_versions(python: Path) -> list[str]:
    """Every package of an environment and its version, for the key of a cell."""
    listing = subprocess.run(
        [
            str(python),
            "-c",
            "from importlib.metadata import distributions\n"
            "print(*sorted({f'{d.name}=={d.version}' for d in distributions()}), sep='\\n')",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    return listing.stdout.split()


def read_key(path: Path) -> str:
    """The key under which a result file was written; empty where there is none."""
    if not path.exists():
        return ""
    return str(json.loads(path.read_text())["key"])


def cells_of(
    programs: Mapping[str, Program],
    chosen: Mapping[str, Sequence[str]],
    schemes: Sequence[Scheme],
    seeds: Sequence[int],
    only: Sequence[str] = (),
) -> list[Cell]:
    """The grid of chosen presets, less what `only` (PROGRAM or PROGRAM:PRESET) leaves out."""
    return [
        Cell(program, preset, scheme, draw)
        for seed in seeds
        for scheme in schemes
        for program, presets in chosen.items()
        for preset in presets
        for draw in draws_of(programs[program].presets[preset], seed, seeds)
        if not only or program in only or f"{program}:{preset}" in only
    ]


def draws_of(preset: Preset, seed: int, seeds: Sequence[int]) -> list[int | None]:
    """The draw of a cell; what reads no data is done once, with the first draw."""
    if preset.calibrated:
        return [seed]
    return [None] if seed == seeds[0] else []


def draw_tokens(
    windows: Callable[[], torch.Tensor],
    inputs: Sequence[Path],
    folder: Path,
    seeds: Sequence[int],
    samples: int,
) -> None:
    """Write the draws that are not there yet, or all of them when what they come from changed.

    Args:
        windows: makes all windows of the text [n, length]; called where a draw is missing.
        inputs: the files that the windows come from.
        folder: where the draws lie.
        seeds: one draw each.
        samples: windows in a draw.
    """
    key = digest_value([digest_files([HERE / "calibration.py", *inputs]), samples])
    record = folder / "done.json"
    there = set(json.loads(record.read_text())["seeds"]) if read_key(record) == key else set()
    if missing := sorted(set(seeds) - there):
        write_draws(windows(), folder, missing, samples)
        record.write_text(json.dumps({"key": key, "seeds": sorted(there | set(missing))}) + "\n")


def run_cells(grid: Grid, cells: Sequence[Cell], *, retry: bool) -> tuple[list[Cell], dict[Cell, str]]:
    """Run what is not finished; returns the finished cells, and of the others the last line of the log.

    A cell that failed is not tried again while nothing has changed, but for `retry`.
    """
    finished, failed = [], {}
    for cell in cells:
        reason = run_cell(grid, cell, retry=retry)
        if reason is None:
            finished.append(cell)
        else:
            failed[cell] = reason
    return finished, failed


def run_cell(grid: Grid, cell: Cell, *, retry: bool) -> str | None:
    """Run one cell in its program's environment, its output in a log; why it failed, or nothing."""
    folder, key = grid.folder(cell), grid.key(cell)
    done, failure = folder / "done.json", folder / "failed.json"
    if read_key(done) == key:
        return None
    if not retry and read_key(failure) == key:
        return str(json.loads(failure.read_text())["reason"])
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    program = grid.programs[cell.program]
    command = [str(program.python), str(HERE / program.runner), "--model", str(grid.model)]
    if cell.seed is not None:
        command += ["--calibration", str(grid.draw(cell))]
    command += ["--scheme", str(cell.scheme), "--preset", cell.preset]
    command += ["--threads", str(grid.threads), "--out", str(folder)]
    reason = run_logged(command, folder, grid.threads, grid.patience)
    if reason is None:
        failure.unlink(missing_ok=True)
        done.write_text(json.dumps({"key": key, "inputs": grid.inputs(cell)}) + "\n")
        print(f"{cell.name}: done", flush=True)
    else:
        failure.write_text(json.dumps({"key": key, "reason": reason}) + "\n")
        print(f"{cell.name}: FAILED, see {folder}/log.txt: {reason}", flush=True)
    return reason


def finished_before(grid: Grid, cells: Sequence[Cell]) -> tuple[list[Cell], dict[Cell, str]]:
    """The cells that an earlier call has finished or seen fail, with the same inputs, whatever ran them.

    While a program is worked on its numbers are of yesterday's source; but never of another model or draw.
    """
    finished, failed = [], {}
    for cell in cells:
        done, failure = (grid.folder(cell) / name for name in ("done.json", "failed.json"))
        if done.exists() and json.loads(done.read_text())["inputs"] == grid.inputs(cell):
            finished.append(cell)
        elif failure.exists():
            failed[cell] = str(json.loads(failure.read_text())["reason"])
    return finished, failed


def in_turns(names: Sequence[str], runs: int) -> Iterator[tuple[int, list[str]]]:
    """The number of each round, and the programs in its order: each round begins with another one."""
    for number in range(runs):
        turn = number % len(names)
        yield number, [*names[turn:], *names[:turn]]


def run_kept(command: Sequence[str], folder: Path, key: str, threads: int, patience: float) -> bool:
    """Run a command into an empty folder, and write down by which key; whether it ended well.

    What is written under the key `read_key` tells, so that a run that is there is not made again.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    reason = run_logged(command, folder, threads, patience)
    if reason is not None:
        print(f"{folder}: FAILED, see log.txt there: {reason}", flush=True)
        return False
    (folder / "done.json").write_text(json.dumps({"key": key}) + "\n")
    return True


def run_logged(command: Sequence[str], folder: Path, threads: int, patience: float) -> str | None:
    """Run a command with its output in `log.txt`; the last line of it where the command failed."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false")
    log = folder / "log.txt"
    with log.open("w") as file:
        try:
            status = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=patience,
            ).returncode
        except subprocess.TimeoutExpired:
            return f"not finished after {patience:.0f} seconds"
    if status == 0:
        return None
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"exit status {status} and no output"


def score_cells(grid: Grid, cells: Sequence[Cell], base: PreTrainedModel, windows: Windows) -> None:
    """Score the cells that have no score of this scorer, of these windows and weights."""
    inputs = [HERE / name for name in SCORER_FILES] + model_files(grid.model)
    tokens = [digest_tensor(windows.scored), digest_tensor(windows.of_loss)]
    scorer = digest_value([digest_files(inputs), tokens, torch.__version__])
    keys = {
        cell: digest_value([scorer, digest_files([grid.folder(cell) / "dense.safetensors"])])
        for cell in cells
    }
    waiting = [cell for cell in cells if read_key(grid.folder(cell) / "score.json") != keys[cell]]
    for start in range(0, len(waiting), SCORED_TOGETHER):
        batch = waiting[start : start + SCORED_TOGETHER]
        files = [grid.folder(cell) / "dense.safetensors" for cell in batch]
        for cell, result in zip(batch, score(base, windows, files), strict=True):
            result.save(grid.folder(cell) / "score.json", keys[cell])
            print(f"{cell.name}: divergence {numpy.mean(result.divergence):.5f}", flush=True)


def check_same_matrices(grid: Grid, cells: Sequence[Cell]) -> None:
    """Hold the matrices that each cell has changed against those of the first: fewer would be an advantage.

    Raises:
        ValueError: a cell has changed others.
    """
    expected: set[str] = set()
    for cell in cells:
        with safe_open(grid.folder(cell) / "dense.safetensors", "pt") as file:
            found = {name for name in file.keys() if len(file.get_slice(name).get_shape()) == 2}  # noqa: SIM118
        expected = expected or found
        if found != expected:
            raise ValueError(
                f"{cell.name}: has {min(found ^ expected)} changed or left, unlike {cells[0].name}"
            )
