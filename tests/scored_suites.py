"""Suites written to files, and the scores of a model on them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.bench.metrics import Subject, find
from compress.core.artifact import Artifact
from compress.core.bench import Bench
from compress.core.measurement import Measurement
from compress.models.tasks import resolve
from compress.runtimes import Placement
from compress.runtimes import find as find_runtime


def write(file: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def subject(folder: Path, **options: Any) -> Subject:
    artifact = Artifact.open(folder)
    task = resolve("auto", artifact.config)
    session = find_runtime("torch-eager").load(artifact, task, Placement(dtype="float32"))
    return Subject(artifact=artifact, task=task, options=Bench(**options), session=session)


def score(folder: Path, suite: Path, **options: Any) -> dict[str, Measurement]:
    """The quantities of one suite, without their common beginning."""
    found = find(f"suite:{suite}").measure(subject(folder, **options))
    return {name.split(".")[2]: measurement for name, measurement in found.items()}
