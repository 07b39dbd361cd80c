"""The time of GPTQ on a CPU, ours beside llm-compressor's and GPTQModel's, by what it is spent on.

A random Llama, the same saved tokens, one thread, one process for each run, and the programs taking turns,
so that whatever changes on the machine changes for all. Every program is at its defaults, 4 bits in groups
of 128. What each region holds is said in `run_timed.py`. Two questions, against the peer whose run takes
less: is our solve at most half of its, and everything but the forward pass at most 0.65 of its. And for
scale, rounding to nearest beside a plain copy of the same files.

Run it with ``PYTHONPATH=benchmarks python benchmarks/peers/gptq_time.py``.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from calibration import KEY, shared_folder
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
from random_llama import write_model
from run_timed import CHECK, FORWARD, SOLVE
from safetensors.torch import save_file
from schemes import Rounding
from transformers import LlamaConfig

HERE = Path(__file__).resolve().parent
BITS, GROUP_SIZE = 4, 128
SAMPLES, LENGTH = 64, 256
THREADS = 1  # the regions see the processor time of threads of Python only
VOCABULARY = 4096  # of gutenberg-4m, whose tokenizer lends the peers what they ask for
OURS = ("compress", "compress-quick", "compress-plain")
ROUNDING, COPY = "compress-rtn", "copy"
ENVIRONMENTS = {
    **dict.fromkeys(OURS, ""),
    "llm-compressor": "llmcompressor",
    "gptqmodel": "gptqmodel",
    ROUNDING: "",
    COPY: "",
}
PEERS = ("llm-compressor", "gptqmodel")
SOLVE_LIMIT, REST_LIMIT = 0.5, 0.65
PATIENCE = 3600.0
REGIONS = (FORWARD, "Hessian", SOLVE, "input/output", CHECK, "other")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder of a Llama in place of a random one")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the random Llama")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the random Llama")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="windows of calibration tokens")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(ENVIRONMENTS), choices=list(ENVIRONMENTS))
    parser.add_argument("--environments", type=Path, default=REPOSITORY.parent / "peers")
    parser.add_argument("--results", type=Path, default=REPOSITORY.parent / "peers/gptq-time")
    parser.add_argument("--report", type=Path, default=REPOSITORY / "reports/peers")
    parser.add_argument("--name", default="gptq_time", help="of the report's files")
    return parser.parse_args()


def subject(arguments: argparse.Namespace) -> str:
    """The name of what is quantized."""
    return arguments.model.name if arguments.model else f"{arguments.hidden}x{arguments.layers}"


def describe(arguments: argparse.Namespace) -> str:
    """What is quantized, in words."""
    if arguments.model:
        return f"Model `{arguments.model.name}`"
    return f"A random Llama of {arguments.layers} blocks, width {arguments.hidden}"


def write_llama(folder: Path, hidden: int, layers: int) -> None:
    """A random Llama with the tokenizer of a model of the same vocabulary."""
    if (folder / "model.safetensors.index.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    write_model(folder, config, torch.bfloat16)
    for file in (shared_folder() / "models/gutenberg-4m").glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)


def write_tokens(file: Path, samples: int) -> None:
    """Random tokens: what is timed does not look at them."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (samples, LENGTH), generator=generator)
    save_file({KEY: tokens}, file)


def run_all(arguments: argparse.Namespace, work: Path, tokens: Path) -> list[dict[str, Any]]:
    """Every run that is not there yet, the programs taking turns; each round begins with another one."""
    digests = {name: program_key(name, arguments) for name in arguments.only}
    found = []
    for number, names in in_turns(arguments.only, arguments.runs):
        for name in names:
            record = run_one(name, number, digests[name], arguments, work, tokens)
            if record is not None:
                found.append({"run": number, **record})
    return found


def python_of(name: str, environments: Path) -> Path:
    folder = ENVIRONMENTS[name]
    return environments.resolve() / folder / "bin/python" if folder else Path(sys.executable)


def program_key(name: str, arguments: argparse.Namespace) -> str:
    """What decides a program's time: the scripts, its environment, for ours its source, and the work."""
    files = [*sorted(HERE.glob("run_*.py")), HERE / "cell.py", HERE / "regions.py"]
    if not ENVIRONMENTS[name]:
        files += sorted((REPOSITORY / "compress").rglob("*.py"))
    shape = [subject(arguments), arguments.samples]
    versions = installed_versions(python_of(name, arguments.environments))
    return digest_value([digest_files(files), versions, shape])


def run_one(
    name: str, number: int, key: str, arguments: argparse.Namespace, work: Path, tokens: Path
) -> dict[str, Any] | None:
    """One run in a process of its own, or the record of it; nothing where it failed."""
    folder = work / name / f"run-{number}"
    if read_key(folder / "done.json") != key:
        command = [str(python_of(name, arguments.environments)), str(HERE / "run_timed.py")]
        command += ["--model", str(work / "model"), "--calibration", str(tokens)]
        command += ["--scheme", str(Rounding(BITS, GROUP_SIZE))]
        command += ["--preset", name, "--threads", str(THREADS), "--out", str(folder)]
        ended_well = run_kept(command, folder, key, THREADS, PATIENCE)
        shutil.rmtree(folder / "saved", ignore_errors=True)
        if not ended_well:
            return None
    record: dict[str, Any] = json.loads((folder / "timed.json").read_text())
    print(f"{name} run {number}: {record['processor_seconds']:.1f} s", flush=True)
    return record


def medians(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each program the median seconds of every region, of all, and of all but the forward pass."""
    found = {}
    for name in dict.fromkeys(record["program"] for record in records):
        held = [record for record in records if record["program"] == name]
        found[name] = {
            region: statistics.median(each["regions"].get(region, 0.0) for each in held) for region in REGIONS
        }
        found[name]["total"] = statistics.median(each["processor_seconds"] for each in held)
        found[name]["clock"] = statistics.median(each["seconds"] for each in held)
        found[name]["rest"] = statistics.median(rest(each) for each in held)
    return found


def rest(record: Mapping[str, Any]) -> float:
    """Everything but the forward pass."""
    return float(record["processor_seconds"] - record["regions"].get(FORWARD, 0.0))


def ratios(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Ours over the faster peer's, run by run, and the medians against the limits."""
    middle = medians(records)
    peers = [name for name in PEERS if name in middle]
    found: dict[str, Any] = {"ours": {}}
    if peers:
        rival = min(peers, key=lambda name: middle[name]["total"])
        found["rival"] = rival
        judged = {name: _against(name, rival, records) for name in OURS}
        found["ours"] = {name: items for name, items in judged.items() if items}
    if ROUNDING in middle and COPY in middle:
        found["rtn_share_of_copy"] = middle[COPY]["clock"] / middle[ROUNDING]["clock"]
        found["rtn_processor_times"] = middle[ROUNDING]["total"] / middle[COPY]["total"]
        checked = middle[ROUNDING]["total"] / (middle[ROUNDING]["total"] - middle[ROUNDING][CHECK])
        found["rtn_share_of_copy_unverified"] = found["rtn_share_of_copy"] * checked
    return found


def _against(name: str, rival: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    by_run = {(record["program"], record["run"]): record for record in records}
    runs = [run for program, run in by_run if program == name and (rival, run) in by_run]
    pairs = [(by_run[name, run], by_run[rival, run]) for run in runs]
    if not pairs:
        return {}
    solve = [ours["regions"][SOLVE] / theirs["regions"][SOLVE] for ours, theirs in pairs]
    others = [rest(ours) / rest(theirs) for ours, theirs in pairs]
    return {
        "solve": _judged(solve, SOLVE_LIMIT),
        "everything but the forward": _judged(others, REST_LIMIT),
    }


def _judged(values: list[float], limit: float) -> dict[str, Any]:
    middle = statistics.median(values)
    verdict = "PASS" if middle <= limit else "FAIL"
    return {"of_each_run": values, "median": middle, "limit": limit, "verdict": verdict}


def render(report: Mapping[str, Any]) -> str:
    """The table, from the report's own numbers."""
    settings, machine = report["settings"], report["machine"]
    lines = [
        "# The time of GPTQ beside the peers" if "rival" in report["ratios"] else "# The rate of rounding",
        "",
        f"{settings['subject']}, bfloat16; "
        f"{settings['samples']} windows of {settings['length']} random tokens; W{BITS} g{GROUP_SIZE}, every "
        f"program at its defaults, {THREADS} thread. Seconds of processor time from the original's folder to "
        f"the result's, median of {settings['runs']} runs that took turns, each in a process that had "
        f"already done the same on a small model. Machine: {machine['cores']} cores "
        f"{machine['processor']}, no accelerator.",
        "",
        f"| program | {' | '.join(REGIONS)} | total | all but the forward | by the clock |",
        f"|---|{'---|' * (len(REGIONS) + 3)}",
    ]
    for name, held in report["medians"].items():
        cells = [f"{held[each]:.2f}" for each in (*REGIONS, "total", "rest", "clock")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    found = report["ratios"]
    if "rival" in found:
        lines += [
            "",
            f"Ours over {found['rival']}'s, whose whole run is the faster of the peers'. `compress-quick` is "
            "ours without the refinement (`--refinement 0`), `compress-plain` also without the search of "
            "ranges and the signs of scales. The peers do none of the three.",
            "",
            "| program | | of each run | median | at most | |",
            "|---|---|---|---|---|---|",
        ]
    for program, judged in found["ours"].items():
        for name, item in judged.items():
            runs = ", ".join(f"{value:.2f}" for value in item["of_each_run"])
            verdict = f"{item['median']:.2f} | {item['limit']} | {item['verdict']}"
            lines.append(f"| {program} | {name} | {runs} | {verdict} |")
    if "rtn_share_of_copy" in found:
        lines += [
            "",
            f"Rounding to nearest reads {report['runs'][0]['model_bytes'] / 2**20:.0f} MiB at "
            f"{100 * found['rtn_share_of_copy']:.1f}% of the rate of a plain copy of the same files by the "
            f"clock, both waiting for the disk, and takes {found['rtn_processor_times']:.1f} times its "
            "processor time; by the clock it is at "
            f"{100 * found['rtn_share_of_copy_unverified']:.1f}% without reading back what it wrote.",
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    arguments = read_arguments()
    torch.set_num_threads(THREADS)
    work = arguments.results.resolve() / f"{subject(arguments)}-{arguments.samples}"
    work.mkdir(parents=True, exist_ok=True)
    if arguments.model is None:
        write_llama(work / "model", arguments.hidden, arguments.layers)
    elif not (work / "model").exists():
        (work / "model").symlink_to(arguments.model.resolve(), target_is_directory=True)
    write_llama(work / "warm", 128, 1)
    tokens = work / "tokens.safetensors"
    write_tokens(tokens, arguments.samples)
    records = run_all(arguments, work, tokens)
    report = {
        "settings": {
            "subject": describe(arguments),
            "samples": arguments.samples,
            "length": LENGTH,
            "runs": arguments.runs,
        },
        "machine": this_machine(),
        "medians": medians(records),
        "ratios": ratios(records),
        "runs": records,
    }
    arguments.report.mkdir(parents=True, exist_ok=True)
    (arguments.report / f"{arguments.name}.json").write_text(json.dumps(report) + "\n")
    (arguments.report / f"{arguments.name}.md").write_text(render(report))
    print(f"{len(records)} runs; {arguments.report / arguments.name}.md")
    return 0 if len(records) == arguments.runs * len(arguments.only) else 1


if __name__ == "__main__":
    sys.exit(main())
