"""Our GPTQ beside llm-compressor's and GPTQModel's, on the same calibration tokens.

For each draw, width and preset: quantize, read the dense weights, score them with one scorer,
and compare by a paired difference. What is finished is kept (`grid.py`).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy
import run_compress
import run_gptqmodel
import run_llmcompressor
import torch
from arms import MARGIN, arms_of, comparisons_of
from calibration import document_windows, read_documents, shared_folder
from grid import (
    OURS,
    REPOSITORY,
    Grid,
    Program,
    cells_of,
    draw_tokens,
    run_cells,
    score_cells,
    this_machine,
)
from schemes import Rounding
from scoring import LENGTH, load_base, losses, make_windows
from tables import differences_table, presets_section

GROUP_SIZE = 128
SAMPLES = 64  # windows of calibration tokens in a draw
METHOD = "gptq"


def render(report: dict[str, Any]) -> str:
    """The table, from the report's own numbers."""
    machine, settings = report["machine"], report["settings"]
    lines = [
        "# GPTQ beside the peers",
        "",
        f"Model `{settings['model']}`, symmetric, group {settings['group_size']}; {settings['calibration']}.",
        f"KL(base || quantized) in nats a token, float32, over {settings['windows']} windows of "
        f"{settings['length']} tokens, {settings['windows_per_document']} from each of the "
        f"{settings['documents']} documents of `{settings['text']}`. Loss: nats a token on the "
        f"first {settings['loss_tokens']:,} tokens (base {report['base_loss']:.4f}).",
        f"Seconds are processor time of the quantization alone, {settings['threads']} thread(s), "
        f"median of the draws; memory is the peak of the whole process. "
        f"Machine: {machine['cores']} cores {machine['processor']}, no accelerator.",
        "",
    ]
    for bits in sorted({row["bits"] for row in report["arms"]}, reverse=True):
        lines += _section(report, bits)
    return "\n".join([*lines, *presets_section(report["arms"])]) + "\n"


def _section(report: dict[str, Any], bits: int) -> list[str]:
    """The arms of one width, and their comparisons."""
    lines = [
        f"## W{bits}",
        "",
        "| program | preset | draws | KL | lowest to highest draw | loss | seconds | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    arms = [row for row in report["arms"] if row["bits"] == bits]
    for row in sorted(arms, key=lambda row: float(row["divergence"])):
        draws = row["divergence_of_each_draw"]
        lines.append(
            f"| {row['program']} | {row['preset']} | {len(draws)} | {row['divergence']:.5f} "
            f"| {min(draws):.5f} to {max(draws):.5f} | {row['loss']:.4f} "
            f"| {numpy.median(row['quantization_processor_seconds']):.1f} "
            f"| {max(row['peak_memory_mebibytes']):.0f} |"
        )
    lines += differences_table([item for item in report["comparisons"] if item["bits"] == bits])
    return [*lines, ""]


def read_arguments() -> argparse.Namespace:
    environments = REPOSITORY.parent / "peers"
    shared = shared_folder()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="programs, or PROGRAM:PRESET")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--windows-per-document", type=int, default=40)
    parser.add_argument("--model", type=Path, default=shared / "models/gutenberg-4m")
    parser.add_argument("--text", type=Path, default=shared / "data/gutenberg_valid.txt.gz")
    parser.add_argument("--train-text", type=Path, default=shared / "data/gutenberg_train.txt.gz")
    parser.add_argument("--results", type=Path, default=environments / "results")
    parser.add_argument("--report", type=Path, default=REPOSITORY / "reports/peers")
    for program, folder in (("llm-compressor", "llmcompressor"), ("gptqmodel", "gptqmodel")):
        parser.add_argument(f"--{program}-python", type=Path, default=environments / folder / "bin/python")
    parser.add_argument("--compress-python", type=Path, default=Path(sys.executable))
    return parser.parse_args()


def make_grid(arguments: argparse.Namespace) -> Grid:
    results = arguments.results.resolve()
    runners = {
        "llm-compressor": ("run_llmcompressor.py", run_llmcompressor, arguments.llm_compressor_python),
        "gptqmodel": ("run_gptqmodel.py", run_gptqmodel, arguments.gptqmodel_python),
        OURS: ("run_compress.py", run_compress, arguments.compress_python),
    }
    programs = {
        name: Program(runner, module.PRESETS, python) for name, (runner, module, python) in runners.items()
    }
    return Grid(programs, arguments.model.resolve(), results / "draws", results, arguments.threads)


def main() -> int:
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    grid = make_grid(arguments)
    chosen = {
        name: [each for each, preset in program.presets.items() if preset.method == METHOD]
        for name, program in grid.programs.items()
    }
    schemes = [Rounding(bits, GROUP_SIZE) for bits in arguments.bits]
    cells = cells_of(grid.programs, chosen, schemes, arguments.seeds, arguments.only)
    draw_tokens(
        lambda: torch.cat(document_windows(grid.model, read_documents(arguments.train_text), LENGTH)),
        [arguments.train_text, grid.model / "tokenizer.json"],
        grid.draws,
        arguments.seeds,
        SAMPLES,
    )
    finished, _ = run_cells(grid, cells, retry=True)

    windows = make_windows(grid.model, arguments.text, arguments.windows_per_document)
    base = load_base(grid.model)
    score_cells(grid, finished, base, windows)
    arms = arms_of(grid, finished)
    report = {
        "settings": {
            "model": grid.model.name,
            "text": arguments.text.name,
            "group_size": GROUP_SIZE,
            "calibration": f"{SAMPLES} windows of {LENGTH} tokens of `{arguments.train_text.name}`",
            "windows": len(windows.document),
            "windows_per_document": arguments.windows_per_document,
            "documents": len(set(windows.document)),
            "length": LENGTH,
            "loss_tokens": windows.of_loss.numel(),
            "threads": arguments.threads,
            "margin": MARGIN,
        },
        "machine": this_machine(),
        "base_loss": float(numpy.mean(losses(base, windows.of_loss, [{}]))),
        "arms": arms,
        "comparisons": comparisons_of(arms, windows.document, ["bits"]),
        "document_of_each_window": windows.document,
    }
    arguments.report.mkdir(parents=True, exist_ok=True)
    (arguments.report / "gptq.json").write_text(json.dumps(report) + "\n")
    (arguments.report / "gptq.md").write_text(render(report))
    print(f"{len(finished)} of {len(cells)} cells; {arguments.report / 'gptq.md'}")
    return 0 if len(finished) == len(cells) else 1


if __name__ == "__main__":
    sys.exit(main())
