"""Every method of ours beside the peers' own, on three models and four schemes.

What is measured, and how, says `comparison.py`.

Two questions, each with an interval for an answer:

- does our best method beat the best peer, at 3 and 2 bits;
- is each of our methods no worse than each peer's own version of the same method.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

import run_autoround
import run_compress
import run_gptqmodel
import run_hqq
import run_llmcompressor
from arms import MARGIN
from comparison import (
    Runners,
    make_parser,
    make_programs,
    measure,
    start,
    write_report,
)
from grid import OURS, Grid, Program, cells_of, this_machine
from quantization_report import render
from quantization_verdicts import CONFIDENCE, verdicts_of
from schemes import Rounding
from subjects import subjects, write_stories

SCHEMES = (Rounding(4, 128), Rounding(4, 32), Rounding(3, 128), Rounding(2, 64))
RUNNERS: Runners = {
    OURS: ("run_compress.py", run_compress, ""),
    "llm-compressor": ("run_llmcompressor.py", run_llmcompressor, "llmcompressor"),
    "gptqmodel": ("run_gptqmodel.py", run_gptqmodel, "gptqmodel"),
    "auto-round": ("run_autoround.py", run_autoround, "autoround"),
    "hqq": ("run_hqq.py", run_hqq, "hqq"),
}


def read_arguments() -> argparse.Namespace:
    parser = make_parser((__doc__ or "").splitlines()[0], "quantization", SCHEMES)
    parser.add_argument("--models", nargs="+", help="some of the models; all otherwise")
    parser.add_argument("--also", nargs="+", default=[], help="more presets, PROGRAM:PRESET")
    return parser.parse_args()


def standard_presets(programs: Mapping[str, Program], also: Sequence[str]) -> dict[str, list[str]]:
    """Of each program its standard presets, and those that were asked for."""
    return {
        name: [
            preset for preset, held in program.presets.items() if held.standard or f"{name}:{preset}" in also
        ]
        for name, program in programs.items()
    }


def main() -> int:
    arguments = read_arguments()
    results = start(arguments)
    write_stories(results / "texts")
    known = subjects(results / "texts")
    programs = make_programs(arguments.environments, RUNNERS)
    chosen = standard_presets(programs, arguments.also)
    parts = []
    for name in arguments.models or list(known):
        folder = results / name
        grid = Grid(programs, known[name].model.resolve(), folder / "draws", folder, arguments.threads)
        cells = cells_of(programs, chosen, arguments.schemes, arguments.seeds, arguments.only)
        subject = replace(known[name], windows=arguments.windows or known[name].windows)
        part = measure(subject, grid, cells, arguments)
        parts.append(part | {"verdicts": verdicts_of(part["arms"], part["document_of_each_window"])})
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
    write_report(arguments.report, "quantization", report, render(report))
    failures = sum(len(part["did_not_run"]) for part in parts)
    print(f"{failures} cells did not run; {arguments.report / 'quantization.md'}")
    return 0 if failures == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
