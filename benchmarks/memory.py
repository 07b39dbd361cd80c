"""Peak memory of a whole command against the depth of the model.

The claim: a run, verification included, needs what the import needs, three blocks, the embeddings and
the activations, whatever the depth. A random model is written block by block, the command runs under
that limit (a memory cgroup where one may be made, else ``RLIMIT_DATA``), and its peak is read from the
kernel. Run it with ``python benchmarks/memory.py``; results go to ``reports/memory``.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from random_llama import block_shapes, count_bytes, write_model
from safetensors.torch import save_file
from transformers import LlamaConfig

HIDDEN, INTERMEDIATE, VOCABULARY = 1024, 2048, 8192
SAMPLES, LENGTH, BATCH = 8, 64, 4
METHODS: dict[str, tuple[str, ...]] = {
    "rtn": ("rtn",),
    "gptq": ("gptq",),
    # The paper's method alone: what a deep model takes in minutes.
    "gptq-plain": ("gptq", "--clip", "none", "--no-signed-scales", "--refinement", "0"),
}
CGROUP = Path("/sys/fs/cgroup/memory") / f"compress-memory-benchmark-{os.getpid()}"
IMPORTS = "import torch, transformers, accelerate, compressed_tensors, scipy, compress.sweep.quantization"


@dataclass(frozen=True)
class Reading:
    """One run of one command."""

    method: str
    layers: int
    model_bytes: int
    limit_bytes: int
    peak_bytes: int
    peak_anonymous_bytes: int
    seconds: float
    exit_code: int
    limited_by: str


def configuration(layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )


def block_bytes() -> int:
    return count_bytes(block_shapes(configuration(1), 0), torch.float32)


def watch(process: subprocess.Popen[bytes], peaks: dict[str, int]) -> None:
    """Follow the resident set of a process: all of it, and the anonymous part."""
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
        except OSError:
            return
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        for field in ("VmHWM", "RssAnon"):
            if field in fields:
                peaks[field] = max(peaks.get(field, 0), int(fields[field].split()[0]) * 1024)
        time.sleep(0.02)


def run(command: list[str], limit: int | None) -> tuple[int, dict[str, int], float, str]:
    """Run a command under a limit; exit code, peaks, seconds, and what limited it."""
    limiter = "nothing"
    before = None
    if limit is not None:
        try:
            CGROUP.mkdir(exist_ok=True)
            (CGROUP / "memory.limit_in_bytes").write_text(str(limit))
            (CGROUP / "memory.max_usage_in_bytes").write_text("0")
            limiter = "memory cgroup"

            def before() -> None:
                (CGROUP / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            limiter = "RLIMIT_DATA"

            def before() -> None:
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    started = time.perf_counter()
    process = subprocess.Popen(command, preexec_fn=before, stdout=subprocess.DEVNULL)
    peaks: dict[str, int] = {}
    watcher = threading.Thread(target=watch, args=(process, peaks))
    watcher.start()
    code = process.wait()
    watcher.join()
    return code, peaks, time.perf_counter() - started, limiter


def import_bytes() -> int:
    """The resident set of a process that has imported everything and done nothing."""
    script = f"{IMPORTS}; print(next(l for l in open('/proc/self/status') if 'VmHWM' in l).split()[1])"
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout) * 1024


def measure(method: str, layers: int, work: Path, imported: int, threads: int) -> Reading:
    model, out = work / f"model-{layers}", work / f"out-{method}-{layers}"
    size = (
        write_model(model, configuration(layers), torch.float32)
        if not model.exists()
        else sum(file.stat().st_size for file in model.glob("*.safetensors"))
    )
    embeddings = 4 * VOCABULARY * HIDDEN
    name, *settings = METHODS[method]
    activations = 4 * SAMPLES * LENGTH * HIDDEN if name == "gptq" else 0
    limit = imported + 3 * block_bytes() + embeddings + activations
    command = [sys.executable, "-m", "compress", "quantize", name, str(model), "--out", str(out), "--quiet"]
    command += ["--threads", str(threads), *settings]
    if name == "gptq":
        command += ["--calibration", str(work / "tokens.safetensors"), "--samples", str(SAMPLES)]
        command += ["--sequence-length", str(LENGTH), "--batch-size", str(BATCH)]
    code, peaks, seconds, limiter = run(command, limit)
    shutil.rmtree(out, ignore_errors=True)
    return Reading(
        method, layers, size, limit, peaks.get("VmHWM", 0), peaks.get("RssAnon", 0), seconds, code, limiter
    )


def render(readings: list[Reading], imported: int, environment: dict[str, str]) -> str:
    lines = [
        "# Peak memory against depth",
        "",
        f"Random Llama in float32, width {HIDDEN}, MLP {INTERMEDIATE}, blocks of "
        f"{block_bytes() / 2**20:.0f} MiB, embeddings of {4 * VOCABULARY * HIDDEN / 2**20:.0f} MiB; "
        f"{SAMPLES} x {LENGTH} calibration tokens. The import alone: {imported / 2**20:.0f} MiB. The limit "
        "is the import, three blocks, the embeddings and the activations; the command includes "
        "verification. Sizes in MiB.",
        "",
        "| method | layers | model | limit | model / limit | peak resident | peak anonymous | exit | s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for reading in readings:
        mebibytes = [f"{count / 2**20:,.0f}" for count in (reading.peak_bytes, reading.peak_anonymous_bytes)]
        lines.append(
            f"| {reading.method} | {reading.layers} | {reading.model_bytes / 2**20:,.0f} "
            f"| {reading.limit_bytes / 2**20:,.0f} | {reading.model_bytes / reading.limit_bytes:.1f} "
            f"| {mebibytes[0]} | {mebibytes[1]} | {reading.exit_code} | {reading.seconds:.0f} |"
        )
    lines += ["", f"Limited by: {readings[0].limited_by}. {environment}", ""]
    return "\n".join(lines)


def write(folder: Path, readings: list[Reading], imported: int, environment: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "environment": environment,
        "import_bytes": imported,
        "readings": [asdict(reading) for reading in readings],
    }
    (folder / "memory.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "memory.md").write_text(render(readings, imported, environment))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32, 112])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["rtn", "gptq"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--report", type=Path, default=Path("reports/memory"))
    parser.add_argument(
        "--work", type=Path, help="where the models are written; needs twice the largest model"
    )
    arguments = parser.parse_args()
    environment = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpus": str(os.cpu_count()),
        "threads": str(arguments.threads),
    }
    imported = import_bytes()
    readings: list[Reading] = []
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        work = Path(name)
        save_file({"input_ids": torch.randint(3, VOCABULARY, (SAMPLES, LENGTH))}, work / "tokens.safetensors")
        for layers in arguments.layers:
            for method in arguments.methods:
                readings.append(measure(method, layers, work, imported, arguments.threads))
                print(readings[-1], flush=True)
                # After each, so that what took an hour outlives what comes after it.
                write(arguments.report, readings, imported, environment)
            shutil.rmtree(work / f"model-{layers}", ignore_errors=True)
    print((arguments.report / "memory.md").read_text())
    if any(reading.exit_code for reading in readings):
        raise SystemExit("a command did not fit into its limit")


if __name__ == "__main__":
    main()
