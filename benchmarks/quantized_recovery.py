"""How much of what 3 bits cost a distillation wins back, with the integers trained on their own grid.

Every matrix of the body is rounded to three bits (``quantize.rtn`` and ``quantize.gptq``), and the result is
distilled from the float model (``distill.logits`` of a student that is stored as integers): from what the
integers stand for, from the float weights, and with scales trained as well; and for comparison with adapters
that are rounded again (``distill.lora``). Format, bits and groups are those of the rounded model throughout.
All are then read back by stock transformers and judged on text that was not trained on. What should hold: at
least half of the loss in nats a token that rounding cost is regained by training the integers.

Run it with ``python benchmarks/quantized_recovery.py --subject quickstart``; results go to
``reports/quantized_recovery``.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from compress import engine
from compress.core.artifact import Artifact
from compress.core.run import CalibrationSource
from compress.data import calibration
from compress.models.load import tokenizer
from compress.models.source import resolve
from compress.models.tasks import TextGeneration
from compress.runtimes import Placement
from compress.runtimes.torch_eager import load_model

REPOSITORY: Final = Path(__file__).resolve().parents[1]
SHARED: Final = Path(os.environ.get("COMPRESS_SHARED", REPOSITORY.parent / "shared"))
REPORT: Final = REPOSITORY / "reports" / "quantized_recovery"
BITS: Final = 3
HALF: Final = 0.5
"""Share of the loss by rounding that has to be regained."""
HELD_OUT: Final = 160
"""Windows that are judged."""


@dataclass(frozen=True)
class Subject:
    """A model with its texts, and how long it is trained."""

    model: str
    train: str
    judged: str
    window: int
    tokens: int
    batch: int = 8
    learning_rate: float = 5e-4


@dataclass(frozen=True)
class Arm:
    """One way to make and to train the integers; without a training they are only rounded."""

    name: str
    rounding: dict[str, Any]
    training: dict[str, Any] | None = None


@dataclass
class Result:
    """Losses in nats a token, on the judged text."""

    arm: str
    loss: float
    regained: float | None = None
    seconds: float = 0.0
    told: dict[str, Any] = field(default_factory=dict)


SUBJECTS: Final = {
    "quickstart": Subject("builtin:quickstart", "builtin:stories", "builtin:stories/test", 128, 98_304),
    "gutenberg-4m": Subject(
        str(SHARED / "models/gutenberg-4m"),
        str(SHARED / "data/gutenberg_train.txt.gz"),
        str(SHARED / "data/gutenberg_valid.txt.gz"),
        256,
        98_304,
    ),
}
RTN: Final = {"use": "quantize.rtn", "bits": BITS, "group_size": "channel"}
GPTQ: Final = {"use": "quantize.gptq", "bits": BITS, "group_size": "channel"}
INTEGERS: Final = {"use": "distill.logits", "teacher": "$model"}
ARMS: Final = (
    Arm("rounded to nearest", RTN),
    Arm("integers trained", RTN, INTEGERS),
    Arm("integers trained, from the floats", RTN, {**INTEGERS, "origin": "$model"}),
    Arm(
        "integers and scales trained, from the floats",
        RTN,
        {**INTEGERS, "origin": "$model", "scales": "train"},
    ),
    Arm("adapters, rounded again", RTN, {"use": "distill.lora", "teacher": "$model"}),
    Arm("GPTQ", GPTQ),
    Arm(
        "GPTQ, integers and scales trained, from the floats",
        GPTQ,
        {**INTEGERS, "origin": "$model", "scales": "train"},
    ),
)


def loss_of(folder: Path, subject: Subject) -> float:
    """Nats a token of a model as its users load it, on text that it was not trained on."""
    artifact = Artifact.open(folder)
    model, _ = load_model(artifact, TextGeneration(), Placement("cpu", "float32"))
    source = CalibrationSource(subject.judged, HELD_OUT, subject.window)
    rows = model.get_input_embeddings().weight.shape[0]
    windows = calibration.draw(source, tokenizer(artifact), 7, rows).tokens
    total, count = 0.0, 0
    with torch.inference_mode():
        for batch in windows.split(8):
            logits = model(batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            targets = batch[:, 1:].flatten()
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            count += len(targets)
    return total / count


def run(arm: Arm, subject: Subject, tokens: int, folder: Path) -> tuple[Path, dict[str, Any], float]:
    """Make one arm; its folder, what the lineage says, and the seconds of the training."""
    steps = [arm.rounding]
    if arm.training is not None:
        numbers = {"tokens": tokens, "window": subject.window, "batch": subject.batch}
        steps.append(
            {**numbers, "learning_rate": subject.learning_rate, "precision": "float32", **arm.training}
        )
    data: dict[str, Any] = {"train": subject.train}
    if arm.rounding is GPTQ:
        data |= {"calibration": subject.train, "samples": 64, "sequence_length": subject.window}
    recipe = {"model": subject.model, "device": "cpu", "threads": 1, "data": data, "steps": steps}
    started = time.perf_counter()
    final = engine.run(recipe, folder / "run").final
    seconds = time.perf_counter() - started
    lineage = Artifact.open(final).lineage
    if lineage is None:
        raise RuntimeError(f"{final} has no lineage")
    told = {
        key: lineage.steps[-1].decisions[key]
        for key in ("validation", "merging")
        if key in lineage.steps[-1].decisions
    }
    return final, told, seconds


def measure(name: str, arms: list[str], tokens: int | None) -> None:
    """Run the arms of one subject, writing after each."""
    subject = SUBJECTS[name]
    budget = tokens or subject.tokens
    file = REPORT / f"{name}.json"
    whole = loss_of(resolve(subject.model), subject)
    results = [Result("float", whole)]
    rounded: dict[str, float] = {}
    for arm in ARMS:
        if arms and not any(arm.name.startswith(part) for part in arms):
            continue
        with tempfile.TemporaryDirectory() as folder:
            final, told, seconds = run(arm, subject, budget, Path(folder))
            found = Result(arm.name, loss_of(final, subject), None, seconds, told)
            shutil.rmtree(final)
        use = str(arm.rounding["use"])
        if arm.training is None:
            rounded[use] = found.loss
        elif use in rounded:
            found.regained = (rounded[use] - found.loss) / (rounded[use] - whole)
        results.append(found)
        print(f"{name}: {arm.name}: {found.loss:.4f}, regained {found.regained}", flush=True)
        about = {**asdict(subject), "tokens": budget}
        about |= {key: Path(about[key]).name for key in ("model", "train", "judged")}
        document = {"subject": about, "results": [asdict(entry) for entry in results]}
        REPORT.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    render()


def render() -> None:
    """The table of all subjects that were measured."""
    lines = [
        "# What training integers wins back",
        "",
        f"Made by `benchmarks/quantized_recovery.py`. The body at {BITS} bits, one scale a row; losses in "
        f"nats a token on {HELD_OUT} windows that were not trained on, by stock transformers in float32.",
        "",
    ]
    for file in sorted(REPORT.glob("*.json")):
        document = json.loads(file.read_text(encoding="utf-8"))
        subject = document["subject"]
        lines += [
            f"## {file.stem}",
            "",
            f"{subject['tokens']:,} tokens in windows of {subject['window']}, at {subject['learning_rate']}.",
            "",
            "| | loss | regained |",
            "|---|---|---|",
        ]
        for entry in document["results"]:
            share = "" if entry["regained"] is None else f"{entry['regained']:.0%}"
            lines.append(f"| {entry['arm']} | {entry['loss']:.4f} | {share} |")
        best = max((entry["regained"] or 0.0 for entry in document["results"]), default=0.0)
        verdict = "holds" if best >= HALF else "does not hold"
        lines += ["", f"At least half is regained: {verdict} ({best:.0%}).", ""]
    (REPORT / "README.md").write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    """Measure one subject, or render what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subject", choices=sorted(SUBJECTS))
    parser.add_argument(
        "--arm", action="append", default=[], help="beginning of the name of an arm; several may be given"
    )
    parser.add_argument("--tokens", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.subject is None:
        render()
    else:
        measure(arguments.subject, arguments.arm, arguments.tokens)


if __name__ == "__main__":
    main()
