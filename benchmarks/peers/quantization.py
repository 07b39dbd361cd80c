"""Every method of ours beside the peers' own, on three models and four schemes.

For each model, draw of calibration tokens, scheme and method: quantize in the program's own environment,
read the dense weights from what it saved, score them with one scorer, and compare by a paired difference.
What is finished is kept (`grid.py`), so that the same command goes on where it was stopped.

Two questions, each with an interval for an answer:

- does our best method beat the best peer, at 3 and 2 bits;
- is each of our methods no worse than each peer's own version of the same method.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import run_autoround
import run_compress
import run_gptqmodel
import run_hqq
import run_llmcompressor
import torch
from grid import (
    OURS,
    REPOSITORY,
    Cell,
    Grid,
    Program,
    Scheme,
    arms_of,
    cells_of,
    check_same_matrices,
    draw_tokens,
    finished_before,
    run_cells,
    score_cells,
    this_machine,
)
from quantization_report import render
from quantization_verdicts import CONFIDENCE, MARGIN, verdicts_of
from scoring import has_probabilities, load_base, losses
from subjects import Subject, subjects, write_stories

SAMPLES = 64  # windows of calibration tokens in a draw
SCHEMES = (Scheme(4, 128), Scheme(4, 32), Scheme(3, 128), Scheme(2, 64))
RUNNERS: dict[str, tuple[str, Any, str]] = {
    OURS: ("run_compress.py", run_compress, ""),
    "llm-compressor": ("run_llmcompressor.py", run_llmcompressor, "llmcompressor"),
    "gptqmodel": ("run_gptqmodel.py", run_gptqmodel, "gptqmodel"),
    "auto-round": ("run_autoround.py", run_autoround, "autoround"),
    "hqq": ("run_hqq.py", run_hqq, "hqq"),
}
"""Of each program its runner, and the folder of its environment; ours runs where this runs."""


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", help="some of the models; all otherwise")
    parser.add_argument(
        "--schemes",
        nargs="+",
        default=[f"{each.bits}/{each.group_size}" for each in SCHEMES],
        help="BITS/GROUP",
    )
    parser.add_argument("--only", nargs="+", default=[], help="programs, or PROGRAM:PRESET")
    parser.add_argument("--also", nargs="+", default=[], help="more presets, PROGRAM:PRESET")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--windows", type=int, help="windows that are scored; each model's own number otherwise"
    )
    parser.add_argument("--retry", action="store_true", help="try again what failed")
    parser.add_argument("--report-only", action="store_true", help="of what is finished, and run nothing")
    parser.add_argument(
        "--environments", type=Path, default=REPOSITORY.parent / "peers", help="folder of the environments"
    )
    parser.add_argument("--results", type=Path, default=REPOSITORY.parent / "peers/quantization")
    parser.add_argument("--report", type=Path, default=REPOSITORY / "reports/peers")
    return parser.parse_args()


def scheme_of(text: str) -> Scheme:
    """`3/128` is 3 bits in groups of 128."""
    bits, group_size = text.split("/")
    return Scheme(int(bits), int(group_size))


def make_programs(environments: Path) -> dict[str, Program]:
    """The programs whose environments are there; the others are named and left out."""
    programs = {}
    for name, (runner, module, folder) in RUNNERS.items():
        python = environments / folder / "bin/python" if folder else Path(sys.executable)
        if python.exists():
            programs[name] = Program(runner, module.PRESETS, python)
        else:
            print(f"{name}: left out, there is no {python}")
    return programs


def chosen_presets(programs: Mapping[str, Program], also: Sequence[str]) -> dict[str, list[str]]:
    """Of each program its standard presets, and those that were asked for."""
    return {
        name: [
            preset for preset, held in program.presets.items() if held.standard or f"{name}:{preset}" in also
        ]
        for name, program in programs.items()
    }


def measure(
    subject: Subject, grid: Grid, cells: Sequence[Cell], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Run and score one model's cells; its part of the report."""
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
    arms = arms_of(grid, finished)
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
        "arms": arms,
        "verdicts": verdicts_of(arms, windows.document),
        "did_not_run": [{"cell": cell.name, "reason": reason} for cell, reason in failed.items()],
        "document_of_each_window": windows.document,
    }


def main() -> int:
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    results = arguments.results.resolve()
    sys.path.insert(0, str(REPOSITORY))  # the stories of this repository, also where it is not installed
    write_stories(results / "texts")
    known = subjects(results / "texts")
    programs = make_programs(arguments.environments.resolve())
    chosen = chosen_presets(programs, arguments.also)
    schemes = [scheme_of(each) for each in arguments.schemes]
    parts = []
    for name in arguments.models or list(known):
        folder = results / name
        grid = Grid(programs, known[name].model.resolve(), folder / "draws", folder, arguments.threads)
        cells = cells_of(programs, chosen, schemes, arguments.seeds, arguments.only)
        subject = replace(known[name], windows=arguments.windows or known[name].windows)
        parts.append(measure(subject, grid, cells, arguments))
    report = {
        "settings": {
            "margin": MARGIN,
            "confidence": CONFIDENCE,
            "threads": arguments.threads,
            "seeds": arguments.seeds,
        },
        "machine": this_machine(),
        "models": parts,
    }
    arguments.report.mkdir(parents=True, exist_ok=True)
    (arguments.report / "quantization.json").write_text(json.dumps(report) + "\n")
    (arguments.report / "quantization.md").write_text(render(report))
    failures = sum(len(part["did_not_run"]) for part in parts)
    print(f"{failures} cells did not run; {arguments.report / 'quantization.md'}")
    return 0 if failures == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
