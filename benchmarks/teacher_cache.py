"""Whether a cached teacher leads to where the live one leads, what the cache takes, and what it saves.

A model is halved (``prune.width``), and what is left is distilled from the original twice, on the same
windows in the same order: once with the teacher run over every batch, once from a cache of its k most likely
tokens (``compress teacher cache``). Both students are then judged by the live teacher over the whole
vocabulary, on text that was not trained on. What should hold: the loss of the cached run is within 2% of
that of the live one.

Run it with ``python benchmarks/teacher_cache.py``; results go to ``reports/teacher_cache``.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from compress import engine
from compress.core.artifact import Artifact
from compress.core.run import TrainingSource
from compress.models.source import resolve
from compress.models.tasks import TextGeneration
from compress.numerics.criterion import Criterion
from compress.runtimes import Placement
from compress.runtimes.torch_eager import load_model
from compress.training.cache_options import CacheOptions
from compress.training.head import halves
from compress.training.imitation import Distributions, LiveTeacher
from compress.training.prediction import chunk_of
from compress.training.teacher_cache import TeacherCache

REPOSITORY: Final = Path(__file__).resolve().parents[1]
SHARED: Final = Path(os.environ.get("COMPRESS_SHARED", REPOSITORY.parent / "shared"))
MOST: Final = 0.02
"""How much larger the loss of the cached run may be, as a share of that of the live one."""
HELD_OUT: Final = 128
"""Windows that students are judged on."""


@dataclass(frozen=True)
class Subject:
    """A model with its texts."""

    name: str
    model: str
    train: str
    validation: str | None
    window: int
    tokens: int
    batch: int


SUBJECTS: Final = (
    Subject("quickstart", "builtin:quickstart", "builtin:stories", None, 128, 200_704, 16),
    Subject(
        "gutenberg-4m",
        str(SHARED / "models/gutenberg-4m"),
        str(SHARED / "data/gutenberg_train.txt.gz"),
        str(SHARED / "data/gutenberg_valid.txt.gz"),
        256,
        200_704,
        8,
    ),
)


@dataclass(frozen=True)
class Run:
    """One distillation: losses of the held-out text in nats a token by the live teacher, times in seconds."""

    teacher: str
    divergence: float
    cross_entropy: float
    own: float
    seconds: float
    bytes_a_token: float | None = None
    caching_seconds: float | None = None


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    found = action()
    return found, time.perf_counter() - started


def recipe(
    subject: Subject, arguments: argparse.Namespace, model: str, step: dict[str, Any]
) -> dict[str, Any]:
    data = {"train": subject.train, "calibration": subject.train, "samples": 64, "sequence_length": 128}
    if subject.validation is not None:
        data["validation"] = subject.validation
    return {
        "model": model,
        "device": arguments.device,
        "threads": arguments.threads,
        "data": data,
        "steps": [step],
    }


def judged(subject: Subject, student: Path, windows: torch.Tensor, device: str) -> dict[str, float]:
    """Losses of a student by the live teacher, over the whole vocabulary."""
    placement = Placement(device, "float32")  # type: ignore[arg-type]
    models = [
        load_model(Artifact.open(path), TextGeneration(), placement)[0]
        for path in (student, resolve(subject.model))
    ]
    there = windows.to(device)
    parts = [halves(model, there[:1, :8]) for model in models]
    objective = Distributions(
        parts[0],
        LiveTeacher(parts[1]),
        criterion=Criterion(),
        chunk=chunk_of(models[0].get_input_embeddings().weight.shape[0], device),
        arithmetic="float32",
    )
    losses = objective.judge(there[:8])
    for some in there[8:].split(8):
        losses = losses.plus(objective.judge(some))
    return losses.means()


def measure(subject: Subject, arguments: argparse.Namespace) -> dict[str, Any]:
    """The live run and one run for each cache."""
    work = arguments.work / subject.name
    halved = engine.run(
        recipe(subject, arguments, subject.model, {"use": "prune.width", "keep": 0.5}),
        work / "halved",
        single=True,
    ).final
    step = {
        "use": "distill.logits",
        "teacher": subject.model,
        "tokens": subject.tokens,
        "window": subject.window,
        "batch": subject.batch,
        "learning_rate": 1e-3,
        "evaluation_tokens": HELD_OUT * subject.window,
        "evaluate_every": 1_000_000,
        "keep": "last",
        "precision": "float32",
    }
    runs, windows = [], None
    for k, draws in arguments.kept:
        name = f"{k}-{draws}"
        folder = work / f"cache-{name}"
        options = CacheOptions(
            k=k,
            draws=draws,
            tokens=subject.tokens,
            window=subject.window,
            evaluation_tokens=HELD_OUT * subject.window,
            precision="float32",
        )
        source = TrainingSource(subject.train, subject.validation)
        cached, caching = timed(
            lambda options=options, folder=folder, source=source: engine.cache_teacher(
                subject.model, source, folder, options, device=arguments.device, threads=arguments.threads
            )
        )
        print(f"{subject.name}: cached {name}, {cached.bytes_a_token:.1f} bytes a token", flush=True)
        made = recipe(subject, arguments, str(halved), {**step, "cache": str(folder)})
        result, seconds = timed(
            lambda made=made, name=name: engine.run(made, work / f"by-cache-{name}", single=True)
        )
        if windows is None:
            windows = TeacherCache.open(folder).text(1, HELD_OUT).held_out
            before = judged(subject, halved, windows, arguments.device)
            original = judged(subject, resolve(subject.model), windows, arguments.device)
        found = judged(subject, result.final, windows, arguments.device)
        runs.append(
            Run(
                f"cached, k = {k}, {draws} drawn",
                found["divergence"],
                found["cross_entropy"],
                own_loss(result.final),
                remembered(work / f"by-cache-{name}.seconds", seconds, result.did_nothing),
                cached.bytes_a_token,
                remembered(work / f"cache-{name}.seconds", caching, cached.did_nothing),
            )
        )
        print(f"{subject.name}: {runs[-1]}", flush=True)
    made = recipe(subject, arguments, str(halved), step)
    result, seconds = timed(lambda: engine.run(made, work / "live", single=True))
    found = judged(subject, result.final, windows, arguments.device)
    seconds = remembered(work / "live.seconds", seconds, result.did_nothing)
    live = Run("live", found["divergence"], found["cross_entropy"], own_loss(result.final), seconds)
    print(f"{subject.name}: {live}", flush=True)
    return {
        "subject": {
            **asdict(subject),
            "model": Path(subject.model).name,
            "train": Path(subject.train).name,
            "validation": subject.validation and Path(subject.validation).name,
        },
        "original": original,
        "halved": before,
        "runs": [asdict(run) for run in (live, *runs)],
    }


def pair(text: str) -> tuple[int, int]:
    k, draws = map(int, text.split(","))
    return k, draws


def own_loss(folder: Path) -> float:
    """The last validation loss of the run itself."""
    lineage = Artifact.open(folder).lineage
    assert lineage is not None
    return float(lineage.steps[-1].decisions["validation"]["last"]["loss"])


def remembered(file: Path, seconds: float, did_nothing: bool) -> float:
    """How long something took when it was done."""
    if not did_nothing:
        file.write_text(repr(seconds))
    return float(file.read_text())


def render(documents: list[dict[str, Any]]) -> str:
    lines = [
        "# A cached teacher",
        "",
        "Each model is halved by `prune.width` and distilled from the original (`distill.logits`, forward "
        "divergence) on the same windows in the same order, with the teacher live and from a cache. Losses "
        "are in nats a token on held-out text, by the live teacher over the whole vocabulary; the divergence "
        "is what is minimised. Bytes a token are those of the whole folder of the cache.",
    ]
    for document in documents:
        subject, runs = document["subject"], document["runs"]
        live = runs[0]
        lines += [
            "",
            f"## {subject['name']}",
            "",
            f"`{subject['train']}`, {subject['tokens']:,} tokens in windows of {subject['window']}. Before "
            f"the distillation: divergence {document['halved']['divergence']:.4f}, cross-entropy "
            f"{document['halved']['cross_entropy']:.4f}; cross-entropy of the original "
            f"{document['original']['cross_entropy']:.4f}.",
            "",
            "| teacher | divergence | to live | cross-entropy | to live | loss of the run itself | "
            "bytes a token | seconds | caching, once |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for run in runs:
            shares = [
                f"{100 * (run[name] / live[name] - 1):+.2f}%" for name in ("divergence", "cross_entropy")
            ]
            size = "" if run["bytes_a_token"] is None else f"{run['bytes_a_token']:.1f}"
            caching = "" if run["caching_seconds"] is None else f"{run['caching_seconds']:.0f}"
            lines.append(
                f"| {run['teacher']} | {run['divergence']:.4f} | {shares[0]} | {run['cross_entropy']:.4f} "
                f"| {shares[1]} | {run['own']:.4f} | {size} | {run['seconds']:.0f} | {caching} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--subject", action="append", choices=[subject.name for subject in SUBJECTS])
    parser.add_argument(
        "--kept", type=pair, nargs="+", default=[(64, 12), (64, 0), (16, 12)], metavar="K,DRAWS"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs/teacher_cache")
    parser.add_argument("--report", type=Path, default=REPOSITORY / "reports/teacher_cache")
    arguments = parser.parse_args()
    arguments.report.mkdir(parents=True, exist_ok=True)
    file = arguments.report / "teacher_cache.json"
    known = json.loads(file.read_text()) if file.is_file() else []
    documents = {document["subject"]["name"]: document for document in known}
    for subject in SUBJECTS:
        if not arguments.subject or subject.name in arguments.subject:
            documents[subject.name] = measure(subject, arguments)
            file.write_text(json.dumps(list(documents.values()), indent=1) + "\n")
            (arguments.report / "teacher_cache.md").write_text(render(list(documents.values())))
    print(render(list(documents.values())))


if __name__ == "__main__":
    main()
