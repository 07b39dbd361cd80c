"""Our Wanda and SparseGPT beside llm-compressor's, on the same calibration tokens.

On `gutenberg-4m`, half of the weights and 2:4. Each program at its defaults, and for information our
SparseGPT as its paper has it (`--refinement 0`). The question: is each of our methods no worse than theirs
of the same name. What is measured, and how, says `comparison.py`.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy
import run_compress
import run_llmcompressor
import torch
from arms import MARGIN, comparisons_of
from comparison import Runners, make_parser, make_programs, measure, start, write_report
from grid import OURS, Cell, Grid, cells_of, this_machine
from safetensors.torch import load_file
from schemes import Zeros
from subjects import subjects
from tables import differences_table, failures_section, presets_section

MODEL = "gutenberg-4m"
METHODS = ("wanda", "sparsegpt")
SCHEMES = (Zeros("50%"), Zeros("2:4"))
TOLERANCE = 1e-3
"""Of a matrix's share of zeros: a block of few columns that loses one weight too many, and not a method."""
RUNNERS: Runners = {
    OURS: ("run_compress.py", run_compress, ""),
    "llm-compressor": ("run_llmcompressor.py", run_llmcompressor, "llmcompressor"),
}

Arm = Mapping[str, Any]


def share_of_zeros(weights: Mapping[str, torch.Tensor], zeros: Zeros) -> float:
    """The share of the weights of all matrices that are zero.

    Raises:
        ValueError: a matrix has another share than was asked for, or breaks the pattern.
    """
    gone = total = 0
    for name, weight in weights.items():
        count = int((weight == 0).sum())
        share = count / weight.numel()
        if abs(share - zeros.share) > TOLERANCE:
            raise ValueError(f"{name}: {share:.2%} of the weights are zero, asked for was {zeros}")
        if zeros.pattern is not None:
            kept, of = zeros.pattern
            if bool(((weight.view(-1, of) != 0).sum(1) > kept).any()):
                raise ValueError(f"{name}: a run of {of} weights keeps more than {kept}")
        gone, total = gone + count, total + weight.numel()
    return gone / total


def shares_of_zeros(grid: Grid, cells: Sequence[Cell], arm: Arm) -> list[float]:
    """Of each draw of an arm, counted in the weights that its program saved."""
    return [
        share_of_zeros(load_file(grid.folder(cell) / "dense.safetensors"), cell.scheme)
        for cell in cells
        if isinstance(cell.scheme, Zeros)
        and (cell.program, cell.preset, str(cell.scheme)) == (arm["program"], arm["preset"], arm["zeros"])
        and cell.seed in arm["seeds"]
    ]


def render(report: Mapping[str, Any]) -> str:
    """The page, from the report's own numbers."""
    machine, threads = report["machine"], report["threads"]
    lines = [
        "# Pruning beside llm-compressor",
        "",
        f"Model `{report['model']}`, all {report['arms'][0]['changed_weights']} matrices of the blocks, the "
        f"head left whole; calibrated on {report['calibration']}, the same tensor for each program.",
        f"KL(base || pruned) in nats a token, float32, over {report['windows']} windows of "
        f"{report['length']} tokens, as many from each of the {report['clusters']} documents of "
        f"`{report['text']}`. Loss: nats a token by the model's published protocol (base "
        f"{report['base_loss']:.4f}). Zeros are counted in the weights that each program saved.",
        f"Seconds are processor time, {threads} thread(s), median of the draws: of the pruning alone, and of "
        "the process that loads, prunes and saves; memory is the peak of that process. "
        f"Machine: {machine['cores']} cores {machine['processor']}, no accelerator.",
        "",
    ]
    for zeros in dict.fromkeys(arm["zeros"] for arm in report["arms"]):
        lines += scheme_section(report, zeros)
    lines += failures_section(report["did_not_run"])
    return "\n".join([*lines, *presets_section(report["arms"])]) + "\n"


def scheme_section(report: Mapping[str, Any], zeros: str) -> list[str]:
    """The arms of one scheme from the best to the worst, and their comparisons."""
    lines = [
        f"## {zeros}",
        "",
        "| program | preset | draws | zeros | KL | lowest to highest draw | loss | seconds | process seconds "
        "| MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    arms = [arm for arm in report["arms"] if arm["zeros"] == zeros]
    for arm in sorted(arms, key=lambda arm: float(arm["divergence"])):
        draws = arm["divergence_of_each_draw"]
        lines.append(
            f"| {arm['program']} | {arm['preset']} | {len(draws)} | {100 * arm['share_of_zeros'][0]:.3f}% "
            f"| {arm['divergence']:.5f} | {min(draws):.5f} to {max(draws):.5f} | {arm['loss']:.4f} "
            f"| {numpy.median(arm['quantization_processor_seconds']):.1f} "
            f"| {numpy.median(arm['process_processor_seconds']):.1f} "
            f"| {max(arm['peak_memory_mebibytes']):.0f} |"
        )
    lines += differences_table([item for item in report["comparisons"] if item["zeros"] == zeros])
    return [*lines, ""]


def read_arguments() -> argparse.Namespace:
    return make_parser((__doc__ or "").splitlines()[0], "pruning", SCHEMES).parse_args()


def main() -> int:
    arguments = read_arguments()
    results = start(arguments)
    known = subjects(results / "texts")[MODEL]
    subject = replace(known, windows=arguments.windows or known.windows)
    programs = make_programs(arguments.environments, RUNNERS)
    chosen = {
        name: [preset for preset, held in program.presets.items() if held.method in METHODS]
        for name, program in programs.items()
    }
    cells = cells_of(programs, chosen, arguments.schemes, arguments.seeds, arguments.only)
    grid = Grid(programs, subject.model.resolve(), results / "draws", results, arguments.threads)
    part = measure(subject, grid, cells, arguments)
    arms = [arm | {"share_of_zeros": shares_of_zeros(grid, cells, arm)} for arm in part["arms"]]
    report = part | {
        "arms": arms,
        "comparisons": comparisons_of(arms, part["document_of_each_window"], ["zeros", "method"]),
        "margin": MARGIN,
        "threads": arguments.threads,
        "machine": this_machine(),
    }
    write_report(arguments.report, "pruning", report, render(report))
    failures = len(report["did_not_run"])
    print(f"{failures} cells did not run; {arguments.report / 'pruning.md'}")
    return 0 if failures == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
