"""One comparison of programs on the models of `subjects.py`: its arguments, its programs, its measurement.

For each model, draw of calibration tokens, scheme and preset: compress in the program's own environment, read
the dense weights from what it saved, and score them with one scorer. What is finished is kept (`grid.py`), so
that the same command goes on where it was stopped.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from arms import arms_of
from grid import (
    REPOSITORY,
    Cell,
    Grid,
    Program,
    check_same_matrices,
    draw_tokens,
    finished_before,
    run_cells,
    score_cells,
)
from schemes import parse_scheme
from scoring import has_probabilities, load_base, losses
from subjects import Subject

SAMPLES = 64  # windows of calibration tokens in a draw
Runners = Mapping[str, tuple[str, ModuleType, str]]
"""Of each program its runner, and the folder of its environment; ours runs where this runs."""
Part = dict[str, Any]


def make_parser(description: str, results: str, schemes: Sequence[object]) -> argparse.ArgumentParser:
    """The arguments that the comparisons share; `results` is the folder that they keep cells in."""
    peers = REPOSITORY.parent / "peers"
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--schemes",
        nargs="+",
        type=parse_scheme,
        default=schemes,
        help=" ".join(map(str, schemes)).replace("%", "%%"),
    )
    parser.add_argument("--only", nargs="+", default=[], help="programs, or PROGRAM:PRESET")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--windows", type=int, help="windows that are scored; each model's own number otherwise"
    )
    parser.add_argument("--retry", action="store_true", help="try again what failed")
    parser.add_argument("--report-only", action="store_true", help="of what is finished, and run nothing")
    parser.add_argument("--environments", type=Path, default=peers, help="folder of the environments")
    parser.add_argument("--results", type=Path, default=peers / results)
    parser.add_argument("--report", type=Path, default=REPOSITORY / "reports/peers")
    return parser


def make_programs(environments: Path, runners: Runners) -> dict[str, Program]:
    """The programs whose environments are there; the others are named and left out."""
    programs = {}
    for name, (runner, module, folder) in runners.items():
        python = environments.resolve() / folder / "bin/python" if folder else Path(sys.executable)
        if python.exists():
            programs[name] = Program(runner, module.PRESETS, python)
        else:
            print(f"{name}: left out, there is no {python}")
    return programs


def measure(subject: Subject, grid: Grid, cells: Sequence[Cell], arguments: argparse.Namespace) -> Part:
    """Run and score one model's cells; its part of the report, with the cells that are finished."""
    draw_tokens(
        subject.calibration_windows,
        [subject.train, subject.model / "tokenizer.json"],
        grid.draws,
        arguments.seeds,
        SAMPLES,
    )
    if arguments.report_only:
        finished, failed = finished_before(grid, cells)
    else:
        finished, failed = run_cells(grid, cells, retry=arguments.retry)
    check_same_matrices(grid, finished)
    windows = subject.scored_windows()
    base = load_base(subject.model)
    score_cells(grid, finished, base, windows)
    probabilities = has_probabilities(base)
    return {
        "model": subject.name,
        "measure": "KL" if probabilities else "cosine distance",
        "loss": "nats a token" if probabilities else "relative squared error",
        "base_loss": float(numpy.mean(losses(base, windows.of_loss, [{}]))) if probabilities else 0.0,
        "calibration": f"{SAMPLES} windows of {subject.length} tokens of `{subject.train.name}`",
        "text": subject.held_out.name,
        "windows": len(windows.document),
        "length": subject.length,
        "clusters": len(set(windows.document)),
        "packed": subject.packed,
        "arms": arms_of(grid, finished),
        "did_not_run": [{"cell": cell.name, "reason": reason} for cell, reason in failed.items()],
        "document_of_each_window": windows.document,
    }


def start(arguments: argparse.Namespace) -> Path:
    """Keep torch to its threads and make our package importable; returns the folder of the results."""
    torch.set_num_threads(arguments.threads)
    sys.path.insert(0, str(REPOSITORY))  # the stories of this repository, also where it is not installed
    results: Path = arguments.results.resolve()
    return results


def write_report(folder: Path, name: str, report: Mapping[str, Any], page: str) -> None:
    """Write the report's numbers and its page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report) + "\n")
    (folder / f"{name}.md").write_text(page)
