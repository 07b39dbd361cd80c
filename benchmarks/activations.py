"""Peak memory of a whole command against the memory that its activations may take.

The claim: with ``--activations-memory`` a run needs less memory by what it puts on disk, gives the same
bytes, and takes hardly longer. A random model of a few blocks is pruned on a long text, whose activations are
larger than all weights. Run it with ``python benchmarks/activations.py``; results go to ``reports/memory``.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from memory import import_bytes, run
from random_llama import write_model
from safetensors.torch import save_file
from transformers import LlamaConfig

HIDDEN, VOCABULARY, LAYERS = 128, 1024, 2
LENGTH, BATCH = 512, 32


@dataclass(frozen=True)
class Reading:
    """One run of the command."""

    memory: str
    peak_bytes: int
    peak_anonymous_bytes: int
    seconds: float
    exit_code: int
    digest: str


def configuration() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )


def measure(memory: str, samples: int, work: Path, threads: int) -> Reading:
    out = work / f"out-{memory}"
    command = [sys.executable, "-m", "compress", "prune", "wanda", str(work / "model"), "--out", str(out)]
    command += ["--calibration", str(work / "tokens.safetensors"), "--samples", str(samples)]
    command += ["--sequence-length", str(LENGTH), "--batch-size", str(BATCH), "--quiet"]
    command += ["--threads", str(threads), "--activations-memory", memory]
    code, peaks, seconds, _ = run(command, None)
    digest = hashlib.sha256()
    for file in sorted(out.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return Reading(
        memory, peaks.get("VmHWM", 0), peaks.get("RssAnon", 0), seconds, code, digest.hexdigest()[:16]
    )


def render(readings: list[Reading], samples: int, imported: int, environment: dict[str, str]) -> str:
    stream = 4 * samples * LENGTH * HIDDEN
    lines = [
        "# Peak memory against the memory of activations",
        "",
        f"`prune wanda` on a random Llama in float32, {LAYERS} blocks of width {HIDDEN}; {samples} x "
        f"{LENGTH} calibration tokens, whose activations take {stream / 2**20:,.0f} MiB between blocks. The "
        f"import alone: {imported / 2**20:,.0f} MiB. The command includes verification. Sizes in MiB.",
        "",
        "| `--activations-memory` | peak resident | peak anonymous | s | exit | weights (SHA-256) |",
        "|---|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {reading.memory} | {reading.peak_bytes / 2**20:,.0f} "
        f"| {reading.peak_anonymous_bytes / 2**20:,.0f} | {reading.seconds:.0f} | {reading.exit_code} "
        f"| {reading.digest} |"
        for reading in readings
    ]
    return "\n".join([*lines, "", f"{environment}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", nargs="+", default=["4GB", "32MiB"])
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--report", type=Path, default=Path("reports/memory"))
    parser.add_argument("--work", type=Path, help="where the model and its activations lie")
    arguments = parser.parse_args()
    environment = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(arguments.threads),
    }
    imported = import_bytes()
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        work = Path(name)
        tokens = torch.randint(3, VOCABULARY, (arguments.samples, LENGTH))
        save_file({"input_ids": tokens}, work / "tokens.safetensors")
        write_model(work / "model", configuration(), torch.float32)
        readings = [
            measure(memory, arguments.samples, work, arguments.threads) for memory in arguments.memory
        ]
    arguments.report.mkdir(parents=True, exist_ok=True)
    document = {"environment": environment, "import_bytes": imported, "samples": arguments.samples}
    document["readings"] = [asdict(reading) for reading in readings]
    (arguments.report / "activations.json").write_text(json.dumps(document, indent=1) + "\n")
    text = render(readings, arguments.samples, imported, environment)
    (arguments.report / "activations.md").write_text(text)
    print(text)
    if any(reading.exit_code for reading in readings):
        raise SystemExit("a command failed")
    if len({reading.digest for reading in readings}) > 1:
        raise SystemExit("the results differ")


if __name__ == "__main__":
    main()
