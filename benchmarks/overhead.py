"""What the bench itself adds to a decoded text: its own iteration against the bare transformers loop.

Both sides run the same model object, from the same prompt, in one process. The measured side is the very
iteration that `compress.bench.metrics.decode` times, through the session of a runtime, and its seconds are
those that the bench would report. The bare side calls the model and takes the most likely token, with no
code of compress in the loop. Iterations come in random order; a second bare arm shows what the machine alone
makes of two equal things. The smallest model is the hardest case: an overhead is the same for every model,
and a small one's step is short.

Run it with ``python benchmarks/overhead.py``; results go to ``reports/overhead``.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from compress.bench.environment import describe
from compress.bench.material import prepare
from compress.bench.metrics import Subject
from compress.bench.metrics.decode import Decode
from compress.bench.results import merged
from compress.bench.statistics import effect
from compress.core.artifact import Artifact
from compress.core.bench import Bench
from compress.core.gate import Gate, Judgement
from compress.core.measurement import Measurement
from compress.data.corpora import documents
from compress.models.tasks import resolve
from compress.runtimes._session import TorchSession

REPOSITORY: Final = Path(__file__).resolve().parents[1]
SHARED: Final = Path(os.environ.get("COMPRESS_SHARED", REPOSITORY.parent / "shared"))
ARMS: Final = ("bare", "bench", "bare again")
GATE: Final = Gate.of({"metric": "decode.seconds", "test": "non-inferiority", "margin": "2%"})
"""The claim: 32 tokens take the bench less than 2% longer."""


def bare_seconds(model: PreTrainedModel, prompt: torch.Tensor, steps: int) -> float:
    """Seconds of some decoding steps after a prompt, whose reading is outside the clock.

    In inference mode, which the caller has entered.
    """
    result: Any = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    tokens, cache = result.logits[:, -1].argmax(-1), result.past_key_values
    started = time.perf_counter()
    for _ in range(steps):
        result = model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True)
        tokens, cache = result.logits[:, -1].argmax(-1), result.past_key_values
    return time.perf_counter() - started


def one_launch(folder: Path, text: str, options: Bench, iterations: int, seed: int) -> dict[str, Any]:
    """Seconds of every iteration of each arm in this process, as measurements in JSON."""
    artifact = Artifact.open(folder)
    task = resolve("auto", artifact.config)
    prompts = prepare(artifact, task, documents(text, limit=options.tokens), options).prompts
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).eval()
    subject = Subject(
        artifact=artifact, task=task, options=options, session=TorchSession(model, task, {"device": "cpu"})
    )
    iterate = Decode().iteration(subject, prompts)

    def bench_seconds() -> float:
        done, timing = iterate()
        if done != options.new_tokens:
            raise SystemExit(f"{done} tokens instead of {options.new_tokens}")
        return timing.seconds

    def measured(arm: str) -> float:
        return bench_seconds() if arm == "bench" else bare_seconds(model, prompts, options.new_tokens)

    generator = random.Random(seed)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    # As the worker of the bench does it, around all that it measures.
    with torch.inference_mode():
        for arm in ARMS:
            measured(arm)
        for _ in range(iterations):
            for arm in generator.sample(ARMS, len(ARMS)):
                seconds[arm].append(measured(arm))
    return {
        arm: Measurement.sampled(samples, summary="geometric-mean", unit="s", better="lower").model_dump(
            mode="json"
        )
        for arm, samples in seconds.items()
    }


def launch(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One launch in a process of its own."""
    command = [sys.executable, __file__, "--launch", str(seed), "--model", str(arguments.model)]
    command += ["--text", str(arguments.text), "--iterations", str(arguments.iterations)]
    command += ["--threads", str(arguments.threads)]
    threads = str(arguments.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def judged(before: Measurement, after: Measurement, names: tuple[str, str]) -> Judgement:
    found = effect(after, before, GATE.wants, confidence=GATE.confidence)
    return GATE.judge(found, after.better, before=names[0], after=names[1])


def summarised(launches: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    arms = {arm: merged([one[arm] for one in launches]) for arm in ARMS}
    options = Bench()
    return {
        "command": ["python", "benchmarks/overhead.py", *sys.argv[1:]],
        "environment": describe("cpu", arguments.threads),
        "model": {"name": arguments.model.name, "digest": Artifact.open(arguments.model).digest},
        "shape": {"prompt": options.prompt_length, "new": options.new_tokens, "batch": options.batch_size},
        "iterations": arguments.iterations,
        "arms": {arm: value.model_dump(mode="json") for arm, value in arms.items()},
        "judgements": [
            judged(arms["bare"], arms[arm], ("bare", arm)).model_dump(mode="json") for arm in ARMS[1:]
        ],
    }


def render(document: dict[str, Any]) -> str:
    environment, shape = document["environment"], document["shape"]
    launches = len(set(document["arms"]["bare"]["clusters"]))
    lines = [
        "# The bench's own overhead",
        "",
        f"`{document['model']['name']}`, {shape['new']} tokens after a prompt of {shape['prompt']}, batch "
        f"{shape['batch']}, {environment['threads']} threads; {launches} launches, {document['iterations']} "
        "iterations of each arm, in random order. One-sided bounds, 95% each.",
        "",
        "| arm | milliseconds a token | against the bare loop | less than 2% more |",
        "|---|---:|---:|---|",
    ]
    judgements = {one["after"]: one for one in document["judgements"]}
    for arm, value in document["arms"].items():
        cells = [arm, f"{1e3 * value['value'] / shape['new']:.4f}"]
        if arm in judgements:
            found = judgements[arm]["effect"]
            changes = [f"{100 * (found[name] - 1):+.2f}%" for name in ("point", "low", "high")]
            cells += [f"{changes[0]} [{changes[1]}, {changes[2]}]", judgements[arm]["verdict"]]
        else:
            cells += ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    libraries = ", ".join(f"{name} {version}" for name, version in environment["libraries"].items())
    lines += ["", f"{environment['processor']}; {libraries}.", "", f"`{' '.join(document['command'])}`", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=SHARED / "models/stories260K")
    parser.add_argument("--text", default=str(SHARED / "data/tinystories_sample.txt"))
    parser.add_argument("--launches", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=20, help="of each arm in a launch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", type=Path, default=REPOSITORY / "reports/overhead")
    parser.add_argument("--quick", action="store_true", help="a little of everything, to see that it works")
    parser.add_argument("--launch", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.launch is not None:
        torch.set_num_threads(arguments.threads)
        options = Bench(threads=arguments.threads)
        found = one_launch(arguments.model, arguments.text, options, arguments.iterations, arguments.launch)
        print(json.dumps(found))
        return
    if arguments.quick:
        arguments.launches, arguments.iterations = 3, 5
        arguments.report /= "quick"
    launches = []
    for number in range(arguments.launches):
        launches.append(launch(arguments, number))
        print(f"launch {number + 1} of {arguments.launches}", flush=True)
    document = summarised(launches, arguments)
    arguments.report.mkdir(parents=True, exist_ok=True)
    (arguments.report / "overhead.json").write_text(json.dumps(document) + "\n")
    (arguments.report / "overhead.md").write_text(render(document))
    print(render(document))
    if document["judgements"][0]["verdict"] != "PASS":
        raise SystemExit("not shown: the bench's overhead is less than 2%")


if __name__ == "__main__":
    main()
