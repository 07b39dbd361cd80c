"""Every structured method at three quarters and half of a model's body, without any training.

The body is what lies inside the blocks. Each method takes out as little as keeps to the budget, with and
without the repair of the layers that read what went; `prune.width --budget` spreads the budget over all of
them by itself. The loss is that of the next token on held-out text (disjoint windows, float32). What should
hold: the mixture that the budget chooses is never worse than the best single method by more than 2%.

Run it with ``python benchmarks/structured_pruning.py``; results go to ``reports/structured_pruning``. With
``--speed`` the models of the report (made again, where they are gone) are timed by `compress bench` as well,
in decode and prefill on torch-eager and onnxruntime, beside the speed that was predicted; that wants a
machine on which nothing else runs.
"""

import argparse
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM

from compress import engine
from compress.bench.experiment import compare
from compress.bench.results import ArmResult, Results
from compress.core.artifact import Artifact
from compress.core.bench import Bench
from compress.core.errors import CompressError
from compress.core.measurement import Measurement
from compress.core.passes import own_names
from compress.core.run import CalibrationSource, Run
from compress.data.calibration import draw
from compress.models.blocks import find_blocks
from compress.models.load import skeleton, tokenizer
from compress.models.source import resolve
from compress.sweep.decode_prediction import read_bytes
from compress.sweep.narrow_plan import Asked, plan_narrowing

REPOSITORY: Final = Path(__file__).resolve().parents[1]
SHARED: Final = Path(os.environ.get("COMPRESS_SHARED", REPOSITORY.parent / "shared"))
SHARES: Final = (0.75, 0.5)
BUDGET: Final = "budget"
WHOLE: Final = "as it is"
AGAIN: Final = "as it is, once more"
RATES: Final = ("decode.tokens_per_second", "prefill.tokens_per_second")
MARGIN: Final = 1.02
_HALVINGS: Final = 6


@dataclass(frozen=True)
class Subject:
    """A model with its texts."""

    name: str
    model: str
    calibration: str
    text: str


@dataclass(frozen=True)
class Method:
    """One column of ways to cut: the options of a step from a share that stays.

    Attributes:
        name: in the table.
        use: the pass.
        options: of the pass, from the share.
        asked: the same as a plan takes it, where one tells the size before anything is made.
    """

    name: str
    use: str
    options: Callable[[float], Mapping[str, Any]]
    asked: Callable[[float], Asked] | None = None


@dataclass(frozen=True)
class Cell:
    """What became of one method.

    Attributes:
        body: share of the body's parameters that stays.
        loss: nats a token on held-out text; ``None`` where the method could not be used.
        predicted: speed of decoding, from the bytes read for a token.
        reason: why there is no model.
    """

    subject: str
    share: float
    method: str
    repair: bool
    body: float | None
    loss: float | None
    predicted: float | None
    reason: str = ""


METHODS: Final = (
    Method(
        "MLP channels",
        "prune.width",
        lambda share: {"mlp": share, "heads": 1.0},
        lambda share: Asked(share, 1.0),
    ),
    Method(
        "heads",
        "prune.width",
        lambda share: {"mlp": 1.0, "heads": share},
        lambda share: Asked(1.0, share),
    ),
    Method(
        "MLP channels and heads",
        "prune.width",
        lambda share: {"keep": share},
        lambda share: Asked(share, share),
    ),
    Method(
        "hidden size",
        "prune.width",
        lambda share: {"keep": 1.0, "hidden": share},
        lambda share: Asked(1.0, 1.0, hidden=share),
    ),
    Method(
        "MLP channels, heads and hidden size",
        "prune.width",
        lambda share: {"keep": share, "hidden": share},
        lambda share: Asked(share, share, hidden=share),
    ),
    Method("blocks, by influence", "prune.depth", lambda share: {"keep": share}),
    Method("blocks, neighbours", "prune.depth", lambda share: {"keep": share, "contiguous": True}),
    Method("blocks, by loss", "prune.depth", lambda share: {"keep": share, "by": "loss"}),
    Method("hidden size, rotated", "prune.slice", lambda share: {"keep": share}),
)


def subjects(names: Sequence[str]) -> list[Subject]:
    every = [
        Subject(
            "gutenberg-4m",
            str(SHARED / "models/gutenberg-4m"),
            str(SHARED / "data/gutenberg_train.txt.gz"),
            str(SHARED / "data/gutenberg_valid.txt.gz"),
        ),
        Subject("quickstart", "builtin:quickstart", "builtin:stories", "builtin:stories/test"),
    ]
    return [subject for subject in every if subject.name in names]


def body(folder: Path) -> int:
    """Parameters inside the blocks."""
    model = skeleton(Artifact.open(folder))
    return sum(p.numel() for block in find_blocks(model) for p in block.module.parameters())


def read(folder: Path) -> int:
    model = skeleton(Artifact.open(folder))
    return read_bytes(model, {name: tuple(p.shape) for name, p in model.named_parameters()}, 2)


def windows(subject: Subject, folder: Path, arguments: argparse.Namespace) -> torch.Tensor:
    """Held-out tokens ``[windows, length]``."""
    artifact = Artifact.open(folder)
    words = tokenizer(artifact)
    source = CalibrationSource(subject.text, arguments.tokens // arguments.window, arguments.window)
    return draw(source, words, 0, len(words)).tokens


def loss_of(folder: Path, tokens: torch.Tensor) -> float:
    """Mean nats a token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = 0.0
    with torch.no_grad():
        for part in tokens.split(16):
            total += float(model(input_ids=part, labels=part).loss) * len(part)
    return total / len(tokens)


def recipe(subject: Subject, step: Mapping[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": subject.model,
        "threads": arguments.threads,
        "device": arguments.device,
        "data": {
            "calibration": subject.calibration,
            "samples": arguments.samples,
            "sequence_length": arguments.window,
        },
        "steps": [step],
    }


def made(subject: Subject, step: Mapping[str, Any], out: Path, arguments: argparse.Namespace) -> Path:
    """The model of one step; what is there already is not made again."""
    return engine.run(recipe(subject, step, arguments), out, single=True).final


def size_of(method: Method, share: float, subject: Subject, arguments: argparse.Namespace) -> int:
    """Parameters of the body when a share stays."""
    source = Artifact.open(resolve(subject.model))
    if method.asked is None:
        # Little text is enough to see the size.
        small = argparse.Namespace(**{**vars(arguments), "samples": 2})
        trial = arguments.work / subject.name / "trial"
        try:
            return body(made(subject, {"use": method.use, **method.options(share)}, trial, small))
        finally:
            shutil.rmtree(trial, ignore_errors=True)
    blocks = tuple(f"{block.name}." for block in find_blocks(skeleton(source)))
    shapes = plan_narrowing(method.asked(share), source, Run()).shapes
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(blocks))


def fitting(
    method: Method, subject: Subject, share: float, arguments: argparse.Namespace
) -> Mapping[str, Any]:
    """The options with the largest share that keeps to one of the body's parameters.

    Raises:
        CompressError: none does.
    """
    source = resolve(subject.model)
    if method.use == "prune.depth":
        total = len(find_blocks(skeleton(Artifact.open(source))))
        return method.options(max(1, math.floor(total * share + 1e-9)) / total)
    whole = body(source)
    low, high = 0.0, 1.0
    found: Mapping[str, Any] | None = None
    failed: CompressError | None = None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        try:
            fits = size_of(method, middle, subject, arguments) <= share * whole * 1.001
        except CompressError as error:
            failed, fits = error, False
        if fits:
            found, low = method.options(middle), middle
        else:
            high = middle
    if found is None:
        raise failed or CompressError("no share of it comes to so few parameters")
    return found


def cells(subject: Subject, arguments: argparse.Namespace, known: Sequence[Cell]) -> Iterator[Cell]:
    """Everything of one model that is not known yet."""
    done = {(cell.share, cell.method, cell.repair) for cell in known if cell.subject == subject.name}
    source = resolve(subject.model)
    tokens = windows(subject, source, arguments)
    whole, bytes_read = body(source), read(source)
    if (1.0, WHOLE, False) not in done:
        yield Cell(subject.name, 1.0, WHOLE, False, 1.0, loss_of(source, tokens), 1.0)
    work = arguments.work / subject.name
    for share in SHARES:
        for name, repair in ((name, repair) for name in names() for repair in (False, True)):
            if (share, name, repair) in done:
                continue
            out = work / f"{share:.0%}" / folder_name(name, repair)
            try:
                step = {**step_of(name, subject, share, arguments), "repair": repair}
                folder = made(subject, step, out, arguments)
            except CompressError as error:
                yield Cell(subject.name, share, name, repair, None, None, None, error.message)
                continue
            loss, predicted = loss_of(folder, tokens), bytes_read / read(folder)
            yield Cell(subject.name, share, name, repair, body(folder) / whole, loss, predicted)


def names() -> list[str]:
    """Methods that are there, and the budget over all of them."""
    return [*(method.name for method in METHODS if method.use in own_names()), BUDGET]


def folder_name(name: str, repair: bool) -> str:
    return f"{name.replace(', ', '-').replace(' ', '-')}{'-repaired' if repair else ''}"


def step_of(name: str, subject: Subject, share: float, arguments: argparse.Namespace) -> Mapping[str, Any]:
    """The step of a method that keeps to a share of the body."""
    if name == BUDGET:
        return {"use": "prune.width", "budget": f"{share:.0%}", "trials": arguments.trials}
    method = next(method for method in METHODS if method.name == name)
    return {"use": method.use, **fitting(method, subject, share, arguments)}


def verdicts(found: Sequence[Cell]) -> list[dict[str, Any]]:
    """The budget's choice against the best single method, for each model, share and repair."""
    rows = []
    for subject, share, repair in dict.fromkeys((c.subject, c.share, c.repair) for c in found if c.share < 1):
        here = [c for c in found if (c.subject, c.share, c.repair) == (subject, share, repair)]
        singles = {c.method: c.loss for c in here if c.loss is not None and c.method != BUDGET}
        chosen = next((c.loss for c in here if c.method == BUDGET), None)
        if not singles or chosen is None:
            continue
        best = min(singles, key=lambda name: singles[name])
        ratio = chosen / singles[best]
        rows.append(
            {
                "subject": subject,
                "share": share,
                "repair": repair,
                "best": best,
                "best_loss": singles[best],
                "budget_loss": chosen,
                "ratio": ratio,
                "holds": ratio <= MARGIN,
            }
        )
    return rows


def speeds(
    subject: Subject, found: Sequence[Cell], arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Decode and prefill of every shape that was made, against the model as it is; and all samples."""
    source = resolve(subject.model)
    work = arguments.work / subject.name
    # A repair changes values and no shape, and methods that come to the same shape are as fast.
    shapes: dict[str, tuple[Path, list[Cell]]] = {}
    for cell in found:
        if cell.subject == subject.name and cell.loss is not None and cell.share < 1 and not cell.repair:
            folder = work / f"{cell.share:.0%}" / folder_name(cell.method, False)
            made(subject, step_of(cell.method, subject, cell.share, arguments), folder, arguments)
            shapes.setdefault((folder / "config.json").read_text(), (folder, []))[1].append(cell)
    cells_at = {str(folder.resolve()): cells for folder, cells in shapes.values()}
    rows, samples = [], {}
    for runtime in ("torch-eager", "onnxruntime"):
        options = Bench(
            runtimes=(runtime,),
            threads=arguments.threads,
            tokens=2_560,
            window=256,
            budget=0,
            launches=arguments.launches,
            launch_seconds=2.0,
        )
        results = compare(
            source,
            [folder for folder, _ in shapes.values()],
            work / "bench" / runtime,
            subject.text,
            options=options,
        )
        samples[runtime] = samples_of(results)
        ratios = {(one.after, one.metric): one.ratio for one in results.comparisons}
        for arm in results.arms:
            if arm.role == "before":
                continue
            cells = cells_at.get(str(Path(arm.path).resolve()), [])
            row: dict[str, Any] = {"runtime": runtime}
            for metric in RATES:
                if (ratio := ratios.get((arm.name, metric))) is not None:
                    row[metric] = [ratio.low, ratio.point, ratio.high]
            if arm.role == "again":
                rows.append({"subject": subject.name, "share": 1.0, "method": AGAIN, "predicted": 1.0, **row})
            rows += [{**asdict(cell), **row} for cell in cells]
    return rows, samples


def samples_of(results: Results) -> dict[str, Any]:
    """What one bench was measured on, and every sample of its rates, launch by launch."""
    arms = {}
    for arm in results.arms:
        whose = WHOLE if arm.role == "before" else AGAIN if arm.role == "again" else _folder(arm)
        arms[whose] = {metric: _by_launch(arm.measurements[metric]) for metric in RATES}
    return {"environment": results.environment, "arms": arms}


def _folder(arm: ArmResult) -> str:
    path = Path(arm.path)
    return f"{path.parent.name}/{path.name}"


def _by_launch(value: Measurement) -> list[list[float]]:
    launches: dict[int, list[float]] = {}
    for launch, sample in zip(value.clusters or (), value.samples, strict=True):
        launches.setdefault(launch, []).append(sample)
    return list(launches.values())


def multiple(bounds: Sequence[float | None] | None) -> str:
    """A ratio with its bounds."""
    if bounds is None:
        return ""
    low, point, high = bounds
    return f"{point:.2f}x" if low is None or high is None else f"{point:.2f}x [{low:.2f}, {high:.2f}]"


def render(document: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    lines = ["# Structured pruning without training", "", document["about"], ""]
    for subject in dict.fromkeys(cell["subject"] for cell in document["cells"]):
        own = [cell for cell in document["cells"] if cell["subject"] == subject]
        whole = next(cell for cell in own if cell["share"] == 1)
        lines += [f"## {subject}", "", f"As it is: {whole['loss']:.4f} nats a token.", ""]
        for share in dict.fromkeys(cell["share"] for cell in own if cell["share"] < 1):
            lines += [
                f"### {share:.0%} of the body",
                "",
                "| method | body | loss | with repair | predicted decode speed |",
                "|---|---:|---:|---:|---:|",
            ]
            here = [cell for cell in own if cell["share"] == share]
            for method in dict.fromkeys(cell["method"] for cell in here):
                plain, again = (
                    next((c for c in here if c["method"] == method and c["repair"] is repair), None)
                    for repair in (False, True)
                )
                if plain is None or plain["loss"] is None:
                    reason = "" if plain is None else plain["reason"]
                    lines.append(f"| {method} | | not to be had: {reason} | | |")
                    continue
                repaired = "" if again is None or again["loss"] is None else f"{again['loss']:.4f}"
                lines.append(
                    f"| {method} | {plain['body']:.1%} | {plain['loss']:.4f} | {repaired} "
                    f"| {plain['predicted']:.2f}x |"
                )
            lines.append("")
    lines += [
        "## The budget against the best single method",
        "",
        "| model | body | repair | best single method | its loss | the budget's | ratio | at most 2% worse |",
        "|---|---:|---|---|---:|---:|---:|---|",
    ]
    for row in document["verdicts"]:
        lines.append(
            f"| {row['subject']} | {row['share']:.0%} | {'yes' if row['repair'] else 'no'} | {row['best']} "
            f"| {row['best_loss']:.4f} | {row['budget_loss']:.4f} | {row['ratio']:.4f} "
            f"| {'yes' if row['holds'] else 'no'} |"
        )
    if document.get("speeds"):
        lines += [
            "",
            "## Speed, predicted and measured",
            "",
            "Multiples of the model as it is, by `compress bench`, with one-sided 95% bounds, without repair "
            "(which changes no shape). Methods that come to the same shape were measured once. What is "
            "predicted counts the bytes that are read for a token. In models as small as these a step is "
            "calls more than bytes, and a narrower layer is as many calls: width earns less than its bytes, "
            "and fewer blocks what they save. The last row of a runtime is the model beside itself.",
            "",
            "| model | body | method | runtime | predicted decode | decode | prefill |",
            "|---|---:|---|---|---:|---:|---:|",
        ]
        for row in document["speeds"]:
            measured = (multiple(row.get(metric)) for metric in RATES)
            lines.append(
                f"| {row['subject']} | {row['share']:.0%} | {row['method']} | {row['runtime']} "
                f"| {row['predicted']:.2f}x | {' | '.join(measured)} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--subject", action="append", choices=["gutenberg-4m", "quickstart"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=40_960)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the report")
    parser.add_argument(
        "--speed", action="store_true", help="time what is in the report; models that are gone are made again"
    )
    parser.add_argument("--launches", type=int, default=3, help="timed processes of each, with --speed")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs/structured_pruning")
    parser.add_argument("--report", type=Path, default=REPOSITORY / "reports/structured_pruning")
    arguments = parser.parse_args()
    arguments.report.mkdir(parents=True, exist_ok=True)
    file = arguments.report / "structured_pruning.json"
    wanted = arguments.subject or ["gutenberg-4m", "quickstart"]
    document: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    again = wanted if arguments.fresh else []
    found = [Cell(**cell) for cell in document.get("cells", []) if cell["subject"] not in again]
    about = (
        f"{arguments.samples} calibration windows of {arguments.window} tokens, {arguments.trials} trials of "
        "a budget at most; loss in nats a token on "
        f"{arguments.tokens:,} held-out tokens in windows of {arguments.window}. The body is what lies "
        "inside the blocks."
    )

    speed: list[dict[str, Any]] = document.get("speeds", [])
    samples: dict[str, Any] = document.get("samples", {})

    def store() -> None:
        new = {
            "about": document.get("about", about) if arguments.speed else about,
            "cells": [asdict(cell) for cell in found],
            "verdicts": verdicts(found),
            "speeds": speed,
            "samples": samples,
        }
        file.write_text(json.dumps(new, indent=1) + "\n")
        (arguments.report / "structured_pruning.md").write_text(render(new))

    for subject in subjects(wanted):
        others = [row for row in speed if row["subject"] != subject.name]
        if arguments.speed:
            own, samples[subject.name] = speeds(subject, found, arguments)
            speed = others + own
            store()
            continue
        for cell in cells(subject, arguments, tuple(found)):
            found.append(cell)
            value = cell.reason if cell.loss is None else f"{cell.loss:.4f}"
            print(subject.name, f"{cell.share:.0%}", cell.method, cell.repair, value, flush=True)
            # Other models were timed.
            speed = others
            samples.pop(subject.name, None)
            store()
    print((arguments.report / "structured_pruning.md").read_text())


if __name__ == "__main__":
    main()
