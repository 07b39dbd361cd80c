"""The speed and the memory of distillation on a CPU, ours beside TRL's GKD trainer and DistillKit.

A random Llama of width 256 teaches one half its size, with a vocabulary of 4,096 and of 131,072; the same
saved tokens, batch, precision and optimiser, and the forward divergence for all, whose value in the first
step must agree. Two cases: rows that are full for everyone, and documents of several lengths, which ours cuts
into full windows and the others pad, as each does when nobody asks. One thread, a fresh process for each run,
the programs taking turns. Two questions: tokens a second that are no padding, at least 1.3 times those of
each; and at the larger vocabulary, less memory than each.

Run it with ``PYTHONPATH=benchmarks python benchmarks/peers/distillation.py``.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from grid import (
    REPOSITORY,
    digest_files,
    digest_value,
    in_turns,
    installed_versions,
    read_key,
    run_kept,
    this_machine,
)
from lesson import LENGTHS, TOKENS
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
WINDOW, BATCH, ACCUMULATION = 256, 4, 2
LAYERS = 4
WIDTHS = {"teacher": 256, "student": 128}
SPREAD = 0.1
"""Standard deviation of random weights, so that both models have opinions and differ by some nats."""
SHORTEST = 32
"""Tokens of the shortest document; lengths are drawn evenly from here to a whole window."""
THREADS = 1
OURS = "compress"
PEERS = ("trl", "distillkit")
FASTER = 1.3
AGREE = 1e-3
LARGE = 131_072
RUNS = 5
PATIENCE = 600.0
MIB = 2**20


@dataclass(frozen=True)
class Program:
    """One program: its runner, the folder of its environment, and how it is asked."""

    runner: str
    environment: str
    preset: str = "plain"
    standard: bool = True


PROGRAMS = {
    OURS: Program("run_compress_distill.py", ""),
    "trl": Program("run_trl.py", "trl"),
    "distillkit": Program("run_distillkit.py", "distillkit"),
    "trl-default": Program("run_trl.py", "trl", "default", standard=False),
    "distillkit-default": Program("run_distillkit.py", "distillkit", "default", standard=False),
}


@dataclass(frozen=True)
class Case:
    """A vocabulary, and whether rows are full.

    Attributes:
        steps: optimisation steps of a run.
        warm: of these, steps before the clock counts.
    """

    vocabulary: int
    padded: bool
    steps: int
    warm: int

    @property
    def name(self) -> str:
        return f"{self.vocabulary}-{'documents' if self.padded else 'full'}"

    @property
    def title(self) -> str:
        rows = "documents of several lengths" if self.padded else "full rows"
        return f"Vocabulary {self.vocabulary:,}, {rows}"


CASES = tuple(
    Case(vocabulary, padded, steps, warm)
    for vocabulary, steps, warm in ((4096, 8, 2), (LARGE, 2, 1))
    for padded in (False, True)
)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    standard = [name for name, program in PROGRAMS.items() if program.standard]
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--only", nargs="+", default=standard, choices=list(PROGRAMS))
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--environments", type=Path, default=REPOSITORY.parent / "peers")
    parser.add_argument("--results", type=Path, default=REPOSITORY.parent / "peers/distillation")
    parser.add_argument("--report", type=Path, default=REPOSITORY / "reports/peers")
    parser.add_argument("--report-only", action="store_true", help="of what is finished, and run nothing")
    return parser.parse_args()


def write_models(folder: Path, vocabulary: int) -> None:
    """A teacher, and a student of half its width."""
    for seed, (name, width) in enumerate(WIDTHS.items()):
        if (folder / name / "config.json").exists():
            continue
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=LAYERS,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 128,
            vocab_size=vocabulary,
            max_position_embeddings=WINDOW,
            initializer_range=SPREAD,
            tie_word_embeddings=False,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)


def write_tokens(folder: Path, case: Case) -> None:
    """Random tokens: what is timed does not look at them.

    Full rows are those of one step, so that the first step of each program, in whichever order it reads, is
    of the same tokens. Documents are as many as all steps take, and the windows are the same tokens in a row.
    """
    generator = torch.Generator().manual_seed(0)
    rows = BATCH * ACCUMULATION * (case.steps if case.padded else 1)
    tokens = torch.randint(2, case.vocabulary, (rows, WINDOW), generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({TOKENS: tokens[:1].roll(1).contiguous()}, folder / "held-out.safetensors")
    if not case.padded:
        save_file({TOKENS: tokens}, folder / "windows.safetensors")
        return
    lengths = torch.randint(SHORTEST, WINDOW + 1, (rows,), generator=generator)
    stream = torch.cat([row[:length] for row, length in zip(tokens, lengths.tolist(), strict=True)])
    windows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW).contiguous()
    save_file({TOKENS: tokens, LENGTHS: lengths}, folder / "documents.safetensors")
    save_file({TOKENS: windows}, folder / "windows.safetensors")


def run_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every run that is not there yet, the programs taking turns; each round begins with another one."""
    keys = {name: program_key(name, arguments.environments) for name in arguments.only}
    found = []
    for number, names in in_turns(arguments.only, arguments.runs):
        for case in CASES:
            if case.name not in arguments.cases:
                continue
            for name in names:
                record = run_one(name, case, number, keys[name], arguments)
                if record is not None:
                    found.append({"program": name, "case": case.name, "run": number, **record})
    return found


def python_of(name: str, environments: Path) -> Path:
    folder = PROGRAMS[name].environment
    return environments.resolve() / folder / "bin/python" if folder else Path(sys.executable)


def program_key(name: str, environments: Path) -> str:
    """What decides a program's numbers: its runner, its environment, for ours its source."""
    program = PROGRAMS[name]
    files = [HERE / program.runner, HERE / "lesson.py"]
    if program.environment:
        files.append(HERE / "hugging_face_lesson.py")
    else:
        files += sorted((REPOSITORY / "compress").rglob("*.py"))
    return digest_value([digest_files(files), installed_versions(python_of(name, environments))])


def run_one(
    name: str, case: Case, number: int, key: str, arguments: argparse.Namespace
) -> dict[str, Any] | None:
    """One run in a process of its own, or the record of it; nothing where it failed or is not there."""
    program, results = PROGRAMS[name], arguments.results.resolve()
    shape = [WINDOW, BATCH, ACCUMULATION, LAYERS, WIDTHS, SPREAD, SHORTEST, THREADS, case.steps, case.warm]
    folder = results / case.name / name / f"run-{number}"
    key = digest_value([key, shape])
    if read_key(folder / "done.json") != key:
        if arguments.report_only:
            return None
        models, tokens = results / f"models-{case.vocabulary}", results / f"tokens-{case.name}"
        write_models(models, case.vocabulary)
        write_tokens(tokens, case)
        padded = case.padded and name != OURS
        command = ["env", f"PYTHONPATH={REPOSITORY}"] if name == OURS else []
        command += [str(python_of(name, arguments.environments)), str(HERE / program.runner)]
        command += ["--student", str(models / "student"), "--teacher", str(models / "teacher")]
        command += ["--tokens", str(tokens / f"{'documents' if padded else 'windows'}.safetensors")]
        command += ["--held-out", str(tokens / "held-out.safetensors"), "--out", str(folder)]
        command += ["--batch", str(BATCH), "--accumulation", str(ACCUMULATION), "--steps", str(case.steps)]
        command += ["--preset", program.preset, "--threads", str(THREADS)]
        ended_well = run_kept(command, folder, key, THREADS, PATIENCE)
        shutil.rmtree(folder / "trained", ignore_errors=True)
        if not ended_well:
            return None
    record = measured(json.loads((folder / "lesson.json").read_text()), case.warm)
    speed = (
        f"{record['tokens_per_second']:.0f} tokens/s ({record['clock_tokens_per_second']:.0f} by the clock)"
    )
    print(f"{case.name} {name} run {number}: {speed}, {record['peak_mebibytes']:.0f} MiB", flush=True)
    return record


def measured(record: Mapping[str, Any], warm: int) -> dict[str, Any]:
    """What a run comes to, after its warm steps; seconds are processor time unless the clock is named."""
    (clock, busy), (clock_end, busy_end) = record["marks"][warm], record["marks"][-1]
    tokens = sum(record["tokens"][warm:])
    return {
        "tokens_per_second": tokens / (busy_end - busy),
        "clock_tokens_per_second": tokens / (clock_end - clock),
        "tokens": tokens,
        "seconds": busy_end - busy,
        "clock_seconds": clock_end - clock,
        "peak_mebibytes": record["peak_bytes"] / MIB,
        "loaded_mebibytes": record["loaded_bytes"] / MIB,
        "training_mebibytes": (record["peak_bytes"] - record["loaded_bytes"]) / MIB,
        "first_loss": record["first_loss"],
        "versions": record["versions"],
    }


def judge(records: Sequence[Mapping[str, Any]], case: Case) -> dict[str, Any]:
    """Ours against each peer on one case: ratios run by run, the verdicts, and whether losses agree."""
    by_run = {(item["program"], item["run"]): item for item in records if item["case"] == case.name}
    found: dict[str, Any] = {}
    for peer in (name for name in PROGRAMS if name != OURS):
        runs = [run for program, run in by_run if program == peer and (OURS, run) in by_run]
        pairs = [(by_run[OURS, run], by_run[peer, run]) for run in runs]
        if not pairs:
            continue
        faster = [ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in pairs]
        memory = [ours["peak_mebibytes"] / theirs["peak_mebibytes"] for ours, theirs in pairs]
        apart = [abs(ours["first_loss"] / theirs["first_loss"] - 1) for ours, theirs in pairs]
        found[peer] = {
            "speed_of_each_run": faster,
            "speed": statistics.median(faster),
            "speed_by_the_clock": statistics.median(
                ours["clock_tokens_per_second"] / theirs["clock_tokens_per_second"] for ours, theirs in pairs
            ),
            "fast": "PASS" if statistics.median(faster) >= FASTER else "FAIL",
            "memory_of_each_run": memory,
            "memory": statistics.median(memory),
            "lean": "PASS" if statistics.median(memory) < 1 else "FAIL",
            "losses_apart": max(apart),
            "same_loss": case.padded or max(apart) <= AGREE,
        }
    return found


def page(records: Sequence[Mapping[str, Any]], judged: Mapping[str, Mapping[str, Any]]) -> str:
    """The report."""
    machine = this_machine()
    lines = [
        "# Distillation beside the peers",
        "",
        f"A random Llama of {LAYERS} layers and width {WIDTHS['teacher']} teaches one of width "
        f"{WIDTHS['student']} by the forward divergence; {BATCH} rows of at most {WINDOW} tokens in a pass, "
        f"{ACCUMULATION} passes in a step, float32, AdamW (fused), {THREADS} thread, a fresh process for "
        "each run, the programs taking turns. Medians of the runs; every run is in the JSON file.",
        "",
        "Tokens are those that are no padding. Seconds are processor time, because other work may share the "
        "machine; tokens by the clock stand beside. Memory is the peak of the process (`VmHWM`), and what "
        "training added to the process as it was with both models loaded. Ours judges a window before the "
        "first step, which is in its memory.",
        "",
        f"Machine: {machine['cores']} cores {machine['processor']}, no accelerator, torch "
        f"{machine['torch']}. Full rows: for every program. Documents: {SHORTEST} to {WINDOW} tokens long, "
        "evenly; ours cuts them into full windows, the others pad each batch to its longest, as each does "
        "when nobody asks.",
    ]
    if len(records) < RUNS * len(CASES) * len((OURS, *PEERS)):
        lines += ["", f"Not complete: {RUNS} runs a program and case are asked for, and fewer are here."]
    for case in CASES:
        held = [item for item in records if item["case"] == case.name]
        if held:
            lines += ["", f"## {case.title}", "", *_table(held, judged.get(case.name, {}))]
    lines += ["", "## Versions", ""]
    versions = {item["program"]: item["versions"] for item in records}
    for name, packages in versions.items():
        lines.append(f"- {name}: " + ", ".join(f"{package} {each}" for package, each in packages.items()))
    return "\n".join(lines) + "\n"


def _table(held: Sequence[Mapping[str, Any]], judged: Mapping[str, Any]) -> list[str]:
    lines = [
        "| program | runs | tokens/s | lowest to highest | by the clock | peak MiB | added MiB | first loss "
        f"| ours is faster by (at least {FASTER}) | memory of ours, relative |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in PROGRAMS:
        own = [item for item in held if item["program"] == name]
        if not own:
            continue
        middle = {key: statistics.median(item[key] for item in own) for key in _MIDDLES}
        speeds = [item["tokens_per_second"] for item in own]
        against = judged.get(name)
        verdicts = (
            "| | |"
            if against is None
            else (f"| {against['speed']:.2f} {against['fast']} | {against['memory']:.2f} {against['lean']} |")
        )
        lines.append(
            f"| {name} | {len(own)} | {middle['tokens_per_second']:.0f} "
            f"| {min(speeds):.0f} to {max(speeds):.0f} | {middle['clock_tokens_per_second']:.0f} "
            f"| {middle['peak_mebibytes']:.0f} | {middle['training_mebibytes']:.0f} "
            f"| {middle['first_loss']:.5f} {verdicts}"
        )
    return lines


_MIDDLES = (
    "tokens_per_second",
    "clock_tokens_per_second",
    "peak_mebibytes",
    "training_mebibytes",
    "first_loss",
)


def main() -> int:
    arguments = read_arguments()
    records = run_all(arguments)
    judged = {case.name: judge(records, case) for case in CASES}
    arguments.report.mkdir(parents=True, exist_ok=True)
    found = {"machine": this_machine(), "runs": records, "judged": judged}
    (arguments.report / "distillation.json").write_text(json.dumps(found, indent=1) + "\n")
    (arguments.report / "distillation.md").write_text(page(records, judged))
    apart = [
        f"{case}: {peer} by {items['losses_apart']:.2e}"
        for case, found in judged.items()
        for peer, items in found.items()
        if not items["same_loss"]
    ]
    if apart:
        print("the first losses differ: " + "; ".join(apart), file=sys.stderr)
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
