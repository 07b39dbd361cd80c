"""Distillation beside the peers: what programs are given, what is made of their marks, our own runner."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/peers"))

import distillation
import lesson
import run_compress_distill
from distillation import OURS, Case

FULL = Case(512, padded=False, steps=3, warm=1)
DOCUMENTS = Case(512, padded=True, steps=3, warm=1)


def record(program: str, run: int, *, speed: float, peak: float, loss: float = 1.0) -> dict[str, Any]:
    return {
        "program": program,
        "case": FULL.name,
        "run": run,
        "tokens_per_second": speed,
        "clock_tokens_per_second": speed,
        "peak_mebibytes": peak,
        "training_mebibytes": peak,
        "first_loss": loss,
        "versions": {},
    }


def test_windows_hold_the_tokens_of_the_documents_without_padding(tmp_path: Path) -> None:
    distillation.write_tokens(tmp_path, DOCUMENTS)
    padded = load_file(tmp_path / "documents.safetensors")
    windows = load_file(tmp_path / "windows.safetensors")[lesson.TOKENS].flatten()
    documents = zip(padded[lesson.TOKENS], padded[lesson.LENGTHS].tolist(), strict=True)
    stream = torch.cat([row[:length] for row, length in documents])
    assert len(stream) - len(windows) < distillation.WINDOW
    assert torch.equal(stream[: len(windows)], windows)


def test_full_rows_are_those_of_one_step(tmp_path: Path) -> None:
    distillation.write_tokens(tmp_path, FULL)
    windows = load_file(tmp_path / "windows.safetensors")[lesson.TOKENS]
    assert windows.shape == (distillation.BATCH * distillation.ACCUMULATION, distillation.WINDOW)


def test_warm_steps_count_for_nothing() -> None:
    found = distillation.measured(
        {
            "marks": [(0.0, 0.0), (100.0, 50.0), (102.0, 51.0), (104.0, 52.0)],
            "tokens": [7, 10, 30],
            "peak_bytes": 3 * 2**20,
            "loaded_bytes": 2**20,
            "first_loss": 2.0,
            "versions": {},
        },
        warm=1,
    )
    assert (found["tokens_per_second"], found["clock_tokens_per_second"]) == (20.0, 10.0)
    assert (found["peak_mebibytes"], found["training_mebibytes"]) == (3.0, 2.0)


def test_ratios_are_of_one_round_each() -> None:
    records = [
        *(record(OURS, run, speed=speed, peak=50) for run, speed in enumerate((2, 4, 20))),
        *(record("trl", run, speed=speed, peak=100) for run, speed in enumerate((1, 4, 10))),
    ]
    found = distillation.judge(records, FULL)
    assert found.keys() == {"trl"}
    assert found["trl"]["speed_of_each_run"] == [2.0, 1.0, 2.0]
    assert (found["trl"]["speed"], found["trl"]["fast"]) == (2.0, "PASS")
    assert (found["trl"]["memory"], found["trl"]["lean"]) == (0.5, "PASS")


def test_what_is_timed_must_be_the_same_loss() -> None:
    records = [
        record(OURS, 0, speed=2, peak=1, loss=1.0),
        record("trl", 0, speed=1, peak=2, loss=1.0005),
        record("distillkit", 0, speed=1, peak=2, loss=1.01),
    ]
    found = distillation.judge(records, FULL)
    assert found["trl"]["same_loss"]
    assert not found["distillkit"]["same_loss"]


def test_a_record_has_a_mark_after_each_step(tmp_path: Path) -> None:
    watch = lesson.Watch()
    watch.mark()
    with pytest.raises(ValueError, match="1 marks"):
        watch.write(given(tmp_path, FULL), ())
    assert 0 < watch.loaded_bytes <= watch.peak_bytes


def given(folder: Path, case: Case) -> lesson.Lesson:
    return lesson.Lesson(
        student=folder / "models/student",
        teacher=folder / "models/teacher",
        tokens=folder / "windows.safetensors",
        held_out=folder / "held-out.safetensors",
        batch=1,
        accumulation=2,
        steps=case.steps,
        learning_rate=1e-4,
        preset="plain",
        threads=1,
        out=folder,
    )


def test_our_runner_leaves_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "LAYERS", 1)
    monkeypatch.setattr(distillation, "WINDOW", 16)
    distillation.write_models(tmp_path / "models", FULL.vocabulary)
    distillation.write_tokens(tmp_path, FULL)
    work = given(tmp_path, FULL)
    monkeypatch.setattr(run_compress_distill, "parse_lesson", lambda *_: work)
    run_compress_distill.main()
    found = json.loads((tmp_path / "lesson.json").read_text())
    assert found["tokens"] == [32, 32, 32]
    assert found["first_loss"] > 0
    seconds = [clock for clock, _ in found["marks"]]
    assert len(seconds) == FULL.steps + 1
    assert seconds == sorted(seconds)


def test_the_page_has_a_row_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "CASES", (FULL,))
    records = [record(OURS, 0, speed=3, peak=1), record("trl", 0, speed=2, peak=2)]
    found = distillation.page(records, {FULL.name: distillation.judge(records, FULL)})
    assert "| compress | 1 | 3 |" in found
    assert "| 1.50 PASS | 0.50 PASS |" in found
