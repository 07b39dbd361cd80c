"""Our GPTQ beside llm-compressor's and GPTQModel's, on the same calibration tokens.

For each draw, width and preset: quantize, read the dense weights, score them with one scorer,
and compare by a paired difference. What is finished is kept: a cell is done again when its
scripts, its inputs or the program's versions have changed, and not because a file is absent.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import run_compress
import run_gptqmodel
import run_llmcompressor
import torch
import transformers
from calibration import shared_folder, write_draws
from paired import compare
from scoring import LENGTH, Score, Windows, load_base, losses, make_windows, score
from transformers import PreTrainedModel

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
MARGIN = 0.005
GROUP_SIZE = 128
SAMPLES = 64  # windows of calibration tokens in a draw
OURS = "compress"
RUNNERS: dict[str, tuple[str, Mapping[str, object]]] = {
    "llm-compressor": ("run_llmcompressor.py", run_llmcompressor.PRESETS),
    "gptqmodel": ("run_gptqmodel.py", run_gptqmodel.PRESETS),
    OURS: ("run_compress.py", run_compress.PRESETS),
}
RUNNERS_SHARE = ("cell.py", "calibration.py", "dequantize.py")
SCORER_FILES = ("scoring.py", "calibration.py")
SCORED_TOGETHER = 8  # cells that share one computation of the base's probabilities


@dataclass(frozen=True)
class Cell:
    """One program's preset at one width on one draw."""

    program: str
    preset: str
    bits: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.program}/{self.preset}/w{self.bits}/draw-{self.seed}"


@dataclass(frozen=True)
class Paths:
    """Where everything is."""

    model: Path
    text: Path
    draws: Path
    results: Path
    pythons: dict[str, Path]

    def cell(self, cell: Cell) -> Path:
        return self.results / cell.name

    def draw(self, cell: Cell) -> Path:
        return self.draws / f"draw-{cell.seed}.safetensors"


def digest_files(files: list[Path]) -> str:
    """One digest of the contents of files, in the given order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def digest_value(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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


def program_digest(program: str, python: Path) -> str:
    """What decides a program's numbers: its runner, its environment, and for ours its source."""
    runner, _ = RUNNERS[program]
    files = [HERE / name for name in (runner, *RUNNERS_SHARE)]
    if program == OURS:
        files += sorted((REPOSITORY / "compress").rglob("*.py"))
    return digest_value([digest_files(files), installed_versions(python)])


def program_version(program: str, packages: Mapping[str, str]) -> str:
    """The version that a program says it has; ours is not always installed, so its source says it."""
    if program != OURS:
        return packages[program.replace("-", "")]
    source = (REPOSITORY / "compress" / "__init__.py").read_text()
    return source.split('__version__ = "', 1)[1].split('"', 1)[0]


def read_key(path: Path) -> str:
    """The key under which a result file was written; empty where there is none."""
    if not path.exists():
        return ""
    return str(json.loads(path.read_text())["key"])


def quantize(cell: Cell, paths: Paths, key: str, threads: int) -> bool:
    """Run one cell in its program's environment, its output in a log; whether it succeeded."""
    folder = paths.cell(cell)
    done = folder / "done.json"
    if read_key(done) == key:
        return True
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    command = [str(paths.pythons[cell.program]), str(HERE / RUNNERS[cell.program][0])]
    command += ["--model", str(paths.model), "--calibration", str(paths.draw(cell))]
    command += ["--bits", str(cell.bits), "--group-size", str(GROUP_SIZE)]
    command += ["--preset", cell.preset, "--threads", str(threads)]
    command += ["--out", str(folder)]
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false")
    with (folder / "log.txt").open("w") as log:
        status = subprocess.run(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode
    print(f"{cell.name}: {'quantized' if status == 0 else f'FAILED, see {folder}/log.txt'}")
    if status == 0:
        done.write_text(json.dumps({"key": key}) + "\n")
    return status == 0


def score_cells(cells: list[Cell], paths: Paths, base: PreTrainedModel, windows: Windows) -> None:
    """Score the cells that have no score of this scorer, of these windows and weights."""
    inputs = [HERE / name for name in SCORER_FILES] + [paths.text, *model_files(paths.model)]
    scorer = digest_value([digest_files(inputs), len(windows.document), torch.__version__])
    keys = {
        cell: digest_value([scorer, digest_files([paths.cell(cell) / "dense.safetensors"])]) for cell in cells
    }
    waiting = [cell for cell in cells if read_key(paths.cell(cell) / "score.json") != keys[cell]]
    for start in range(0, len(waiting), SCORED_TOGETHER):
        batch = waiting[start : start + SCORED_TOGETHER]
        files = [paths.cell(cell) / "dense.safetensors" for cell in batch]
        for cell, result in zip(batch, score(base, windows, files), strict=True):
            result.save(paths.cell(cell) / "score.json", keys[cell])
            print(f"{cell.name}: KL {numpy.mean(result.divergence):.5f}", flush=True)


def read_score(path: Path) -> Score:
    held = json.loads(path.read_text())
    return Score(held["divergence"], held["loss"])


def summarise(cells: list[Cell], paths: Paths, document: list[int]) -> dict[str, Any]:
    """Every arm's samples and means, and every comparison of one of ours with one of theirs."""
    arms: dict[tuple[int, str, str], dict[int, Cell]] = {}
    for cell in cells:
        arms.setdefault((cell.bits, cell.program, cell.preset), {})[cell.seed] = cell
    rows, samples = [], {}
    for (bits, program, preset), by_seed in sorted(arms.items(), reverse=True):
        folders = [paths.cell(by_seed[seed]) for seed in sorted(by_seed)]
        scores = [read_score(folder / "score.json") for folder in folders]
        runs = [json.loads((folder / "run.json").read_text()) for folder in folders]
        kept = numpy.array([result.divergence for result in scores])
        samples[bits, program, preset] = (sorted(by_seed), kept)
        rows.append(
            {
                "bits": bits,
                "program": program,
                "preset": preset,
                "settings": runs[0]["settings"],
                "version": program_version(program, runs[0]["packages"]),
                "packages": runs[0]["packages"],
                "source": runs[0]["source"],
                "compared_with": runs[0]["compared_with"],
                "seeds": sorted(by_seed),
                "divergence": float(kept.mean()),
                "divergence_of_each_draw": kept.mean(1).tolist(),
                "loss": float(numpy.mean([result.loss for result in scores])),
                "quantization_seconds": [run["quantization_seconds"] for run in runs],
                "quantization_processor_seconds": [run["quantization_processor_seconds"] for run in runs],
                "process_processor_seconds": [run["process_processor_seconds"] for run in runs],
                "peak_memory_mebibytes": [run["peak_memory_mebibytes"] for run in runs],
                "divergence_of_each_window": numpy.round(kept, 6).tolist(),
            }
        )
    comparisons = []
    for ours, theirs in product(samples, samples):
        if ours[0] != theirs[0] or ours[1] != OURS or theirs[1] == OURS:
            continue
        (our_seeds, our_samples), (their_seeds, their_samples) = samples[ours], samples[theirs]
        shared = sorted(set(our_seeds) & set(their_seeds))
        if not shared:
            continue
        difference = compare(
            our_samples[[our_seeds.index(seed) for seed in shared]],
            their_samples[[their_seeds.index(seed) for seed in shared]],
            document,
        )
        comparisons.append(
            {
                "bits": ours[0],
                "ours": ours[2],
                "theirs": f"{theirs[1]} {theirs[2]}",
                "seeds": shared,
                **asdict(difference),
                "verdict": difference.verdict(MARGIN),
            }
        )
    return {"arms": rows, "comparisons": comparisons, "document_of_each_window": document}


def percent(value: float) -> str:
    return f"{100 * value:+.2f}%"


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
        lines += [
            f"## W{bits}",
            "",
            "| program | preset | draws | KL | lowest to highest draw | loss | seconds | MiB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in sorted(
            (row for row in report["arms"] if row["bits"] == bits),
            key=lambda row: float(row["divergence"]),
        ):
            draws = row["divergence_of_each_draw"]
            lines.append(
                f"| {row['program']} | {row['preset']} | {len(draws)} | {row['divergence']:.5f} "
                f"| {min(draws):.5f} to {max(draws):.5f} | {row['loss']:.4f} "
                f"| {numpy.median(row['quantization_processor_seconds']):.1f} "
                f"| {max(row['peak_memory_mebibytes']):.0f} |"
            )
        held = [item for item in report["comparisons"] if item["bits"] == bits]
        if held:
            lines += [
                "",
                f"Ours less theirs, relative to theirs; margin {percent(MARGIN)}. The bounds are "
                "one-sided, 95%, by bootstrap of windows and of documents; the verdict asks both.",
                "",
                "| ours | theirs | draws | difference | upper, windows | upper, documents | |",
                "|---|---|---|---|---|---|---|",
            ]
        for item in held:
            lines.append(
                f"| {item['ours']} | {item['theirs']} | {len(item['seeds'])} "
                f"| {percent(item['mean'])} | {percent(item['high_by_window'])} "
                f"| {percent(item['high_by_document'])} | {item['verdict']} |"
            )
        lines.append("")
    lines += ["## Presets", "", "| program | preset | settings | read from | checked against |"]
    lines.append("|---|---|---|---|---|")
    described = {
        (row["program"], row["preset"]): (
            f"| {row['program']} {row['version']} | {row['preset']} "
            f"| `{json.dumps(row['settings'])}` | {row['source']} | {row['compared_with']} |"
        )
        for row in report["arms"]
    }
    lines += [described[arm] for arm in sorted(described)]
    return "\n".join(lines) + "\n"


def chosen_cells(arguments: argparse.Namespace) -> list[Cell]:
    """The grid, less what `--only` leaves out."""
    cells = [
        Cell(program, preset, bits, seed)
        for program, (_, presets) in RUNNERS.items()
        for preset in presets
        for bits in arguments.bits
        for seed in arguments.seeds
    ]
    if not arguments.only:
        return cells
    return [
        cell
        for cell in cells
        if any(only in (cell.program, f"{cell.program}:{cell.preset}") for only in arguments.only)
    ]


def read_arguments() -> argparse.Namespace:
    environments = REPOSITORY.parent / "peers"
    shared = shared_folder()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", help="programs, or PROGRAM:PRESET")
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


def draw_tokens(arguments: argparse.Namespace, folder: Path) -> None:
    """Write the draws that are not there yet, or all of them when what they come from changed."""
    made_of = [HERE / "calibration.py", arguments.train_text, arguments.model / "tokenizer.json"]
    key = digest_value([digest_files(made_of), SAMPLES, LENGTH])
    record = folder / "done.json"
    there = set(json.loads(record.read_text())["seeds"]) if read_key(record) == key else set()
    if missing := sorted(set(arguments.seeds) - there):
        write_draws(arguments.model, arguments.train_text, folder, missing, SAMPLES, LENGTH)
        record.write_text(json.dumps({"key": key, "seeds": sorted(there | set(missing))}) + "\n")


def main() -> int:
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    results = arguments.results.resolve()
    paths = Paths(
        model=arguments.model.resolve(),
        text=arguments.text.resolve(),
        draws=results / "draws",
        results=results,
        pythons={
            "llm-compressor": arguments.llm_compressor_python,
            "gptqmodel": arguments.gptqmodel_python,
            OURS: arguments.compress_python,
        },
    )
    cells = chosen_cells(arguments)
    draw_tokens(arguments, paths.draws)

    digests = {
        program: program_digest(program, paths.pythons[program])
        for program in sorted({cell.program for cell in cells})
    }
    model = digest_files(model_files(paths.model))
    finished = []
    for cell in cells:
        settings = RUNNERS[cell.program][1][cell.preset]
        draw = digest_files([paths.draw(cell)])
        key = digest_value(
            [digests[cell.program], settings, model, draw, cell.bits, GROUP_SIZE, arguments.threads]
        )
        if quantize(cell, paths, key, arguments.threads):
            finished.append(cell)

    windows = make_windows(paths.model, paths.text, arguments.windows_per_document)
    base = load_base(paths.model)
    score_cells(finished, paths, base, windows)
    report = {
        "settings": {
            "model": paths.model.name,
            "text": paths.text.name,
            "group_size": GROUP_SIZE,
            "calibration": f"{SAMPLES} windows of {LENGTH} tokens of `{arguments.train_text.name}`",
            "windows": len(windows.document),
            "windows_per_document": arguments.windows_per_document,
            "documents": len(set(windows.document)),
            "length": LENGTH,
            "loss_tokens": windows.loss.numel(),
            "threads": arguments.threads,
            "margin": MARGIN,
        },
        "machine": {
            "processor": platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "base_loss": float(numpy.mean(losses(base, windows.loss, [{}]))),
        **summarise(finished, paths, windows.document),
    }
    arguments.report.mkdir(parents=True, exist_ok=True)
    (arguments.report / "gptq.json").write_text(json.dumps(report) + "\n")
    (arguments.report / "gptq.md").write_text(render(report))
    print(f"{len(finished)} of {len(cells)} cells; {arguments.report / 'gptq.md'}")
    return 0 if len(finished) == len(cells) else 1


if __name__ == "__main__":
    sys.exit(main())
