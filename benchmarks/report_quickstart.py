"""Judges the model that ``train_quickstart.py`` made, and puts it into the package.

    python benchmarks/report_quickstart.py WORK [--threads 2] [--keep-out]

Scores every suite of ``builtin:tasks`` for the model and for its weights rounded to nearest, writes
``reports/quickstart/`` (settings, loss curve, scores beside their chance levels, damage) and the model's
card, and copies the model to ``compress/models/builtin/quickstart/``. With ``--keep-out`` it only prints.
"""

import argparse
import csv
import json
import math
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))

from train_quickstart import Settings, documents_of, rows_of, validation_loss

from compress import engine
from compress.bench.metrics import Subject, find
from compress.core.artifact import Artifact
from compress.core.bench import Bench
from compress.data.builtin.problems import KINDS
from compress.data.builtin.splits import Split
from compress.data.suites import Shape, chance_level, read_suite
from compress.models.tasks import resolve
from compress.runtimes import Placement
from compress.runtimes import find as find_runtime

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "reports" / "quickstart"
PACKAGED = ROOT / "compress" / "models" / "builtin" / "quickstart"
MOST_BYTES = 6_000_000
TEST_WINDOWS = 128

ROUNDED: Mapping[str, Mapping[str, Any]] = {
    "int4, group 32": {"bits": 4, "group_size": 32, "integer_range": "narrow"},
    "int3, group 64": {"bits": 3, "group_size": 64, "integer_range": "narrow"},
    "int3, one scale a row": {"bits": 3, "group_size": "channel", "integer_range": "narrow"},
    "the same, embedding too": {
        "bits": 3,
        "group_size": "channel",
        "integer_range": "narrow",
        "include": ["lm_head", "*embed_tokens"],
    },
    "with the lowest integer": {
        "bits": 3,
        "group_size": "channel",
        "include": ["lm_head", "*embed_tokens"],
    },
}
SCORE_OF = {
    Shape.MULTIPLE_CHOICE: "accuracy",
    Shape.QUESTION_ANSWERING: "exact_match",
    Shape.CLOZE: "accuracy",
}


@dataclass(frozen=True)
class Judged:
    """What one folder scored: nats a token on the test split, and shares of right answers."""

    loss: float
    scores: Mapping[str, float]


def judge(folder: Path, limit: int | None) -> Judged:
    """Score a model folder, computing in float32."""
    return Judged(test_loss(folder), {name: suite_score(folder, name, limit) for name in KINDS})


def suite_score(folder: Path, name: str, limit: int | None) -> float:
    """The share of right answers, as ``compress bench`` counts it."""
    artifact = Artifact.open(folder)
    task = resolve("auto", artifact.config)
    session = find_runtime("torch-eager").load(artifact, task, Placement(dtype="float32"))
    subject = Subject(
        artifact=artifact, task=task, options=Bench(suite_limit=limit, generated_tokens=32), session=session
    )
    found = find(f"suite:builtin:tasks/{name}").measure(subject)
    value = found[f"suite.{name}.{SCORE_OF[KINDS[name].shape]}"].value
    if value is None:
        raise RuntimeError(f"no score for {name}: {found}")
    return value


def test_loss(folder: Path) -> float:
    """Mean nats a token over windows of 256 of the test split."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = rows_of(documents_of(Split.TEST, tokenizer), [Settings.length + 1] * TEST_WINDOWS)
    return validation_loss(model, torch.from_numpy(np.stack(list(rows))))


def judge_rounded(folder: Path, limit: int | None) -> dict[str, Judged]:
    """The model with its weights rounded to nearest, by each way of `ROUNDED`."""
    found = {}
    for name, options in ROUNDED.items():
        with tempfile.TemporaryDirectory() as place:
            recipe = {
                "model": str(folder),
                "device": "cpu",
                "threads": torch.get_num_threads(),
                "steps": [{"use": "quantize.rtn", **options}],
            }
            made = engine.run(recipe, Path(place) / "made", single=True)
            found[name] = judge(made.final, limit)
    return found


def table(stored: Judged, rounded: Mapping[str, Judged]) -> str:
    """Suites by rows; the columns are chance, the model, and what rounding costs."""
    head = ["suite", "asks for", "chance", "score", *(f"{name}" for name in rounded)]
    lines = [" | ".join(["", *head, ""]).strip(), "|---|---|" + "---:|" * (len(head) - 2)]
    for name, kind in KINDS.items():
        chance = chance_level(read_suite(f"builtin:tasks/{name}"))
        base = stored.scores[name]
        losses = [f"{100 * (each.scores[name] - base):+.1f}" for each in rounded.values()]
        cells = [f"`{name}`", kind.title, f"{100 * chance:.1f}", f"{100 * base:.1f}", *losses]
        lines.append("| " + " | ".join(cells) + " |")
    losses = [f"{each.loss - stored.loss:+.3f}" for each in rounded.values()]
    entropy = math.log(Settings.vocabulary)
    cells = ["loss", "nats a token, test split", f"{entropy:.3f}", f"{stored.loss:.3f}", *losses]
    return "\n".join([*lines, "| " + " | ".join(cells) + " |"])


def log_of(work: Path) -> list[dict[str, Any]]:
    """The lines of a training log."""
    return [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]


def card(parameters: int, tokens: int, scores: str) -> str:
    """The model card."""
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# quickstart

A Llama of {parameters:,} parameters that knows one small world: who is where, who has what and how many, sums
below 100, series and times of day, six numbers in order, words again and backwards. It is there to be
compressed: each of its skills has a suite with exact answers (`builtin:tasks`), so damage shows and recovery
shows. It knows nothing else.

It was trained on {tokens:,} tokens of `builtin:stories/train`, a text that the package generates from a seed;
no other text was used. `benchmarks/train_quickstart.py` makes it again, and `reports/quickstart/` records how
it went. Ask it in the layout of its training:

    Context: Mira went to the mill. Ben took the train to the harbour.

    Question: Where is Mira?

    Answer:

Shares of right answers on 200 examples of the test split, in percent; the last columns say what rounding the
weights to nearest changes, symmetrically and, but in the very last one, without the lowest integer.

{scores}
"""


def write(work: Path, model: Path, stored: Judged, rounded: Mapping[str, Judged]) -> None:
    """The report, the card and the packaged model."""
    log = log_of(work)
    settings = Settings(steps=log[-1]["step"])
    tokens = settings.steps * settings.batch_tokens
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    if weights > MOST_BYTES:
        raise SystemExit(f"{weights:,} bytes of weights, at most {MOST_BYTES:,} may ship")
    parameters = transformers.AutoModelForCausalLM.from_pretrained(model).num_parameters()
    scores = table(stored, rounded)
    REPORT.mkdir(parents=True, exist_ok=True)
    document = {
        "settings": asdict(settings),
        "parameters": parameters,
        "weight_bytes": weights,
        "tokens": tokens,
        "seconds": log[-1]["seconds"],
        "digest": Artifact.open(model).digest,
        "chance": {name: chance_level(read_suite(f"builtin:tasks/{name}")) for name in KINDS},
        "stored": asdict(stored),
        "rounded": {name: asdict(each) for name, each in rounded.items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (REPORT / "quickstart.json").write_text(json.dumps(document, indent=1) + "\n")
    with (REPORT / "loss.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(
            stream, ["step", "loss", "answers", "validation", "seconds"], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(log)
    minutes = log[-1]["seconds"] / 60
    (REPORT / "quickstart.md").write_text(
        f"# Training of builtin:quickstart\n\n{parameters:,} parameters, {weights:,} bytes of weights in "
        f"bfloat16; {settings.steps:,} steps of {settings.batch_tokens:,} tokens in {minutes:.0f} minutes. "
        "Loss curve: `loss.csv`; settings and figures: `quickstart.json`.\n\n"
        "Shares of right answers on 200 examples of the test split, in percent, beside the share of a blind "
        "guess; the last columns say what rounding the weights to nearest changes, symmetrically and, but in "
        f"the very last one, without the lowest integer.\n\n{scores}\n"
    )
    (model / "README.md").write_text(card(parameters, tokens, scores))
    shutil.rmtree(PACKAGED, ignore_errors=True)
    shutil.copytree(model, PACKAGED)


def main() -> int:
    parser = argparse.ArgumentParser(description="Judge and package builtin:quickstart.")
    parser.add_argument("work", type=Path, help="folder of train_quickstart.py")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=int, help="examples of each suite")
    parser.add_argument("--keep-out", action="store_true", help="print, and write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = arguments.work / "model"
    stored = judge(model, arguments.limit)
    rounded = judge_rounded(model, arguments.limit)
    print(table(stored, rounded))
    if not arguments.keep_out:
        write(arguments.work, model, stored, rounded)
    return 0


if __name__ == "__main__":
    sys.exit(main())
