"""What a cut model wins back: curves that reach or lead others, the tables, and all arms of a tiny model."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests import models_zoo, quantized_models

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import recovery
import recovery_report
from recovery_report import Curve


def curve(*losses: float) -> Curve:
    return Curve.of([points(*losses)])


def points(*losses: float) -> list[dict[str, float]]:
    return [
        {"tokens": 100 * place, "loss": loss, "divergence": loss / 2} for place, loss in enumerate(losses)
    ]


def test_a_loss_is_reached_at_the_first_evaluation_that_has_it() -> None:
    one = curve(5.0, 4.0, 3.5, 3.6)
    assert one.reaches(6.0) == 0
    assert one.reaches(4.0) == 100
    assert one.reaches(3.55) == 200
    assert one.reaches(3.0) is None


def test_one_leads_from_where_it_stays_below() -> None:
    other = curve(4.0, 3.9, 3.8, 3.7)
    assert curve(4.0, 3.8, 3.7, 3.6).leads(other) == 0
    assert curve(3.0, 4.0, 3.8, 3.7).leads(other) == 200
    assert curve(5.0, 3.0, 3.9, 3.6).leads(other) == 300
    assert curve(1.0, 1.0, 1.0, 4.0).leads(other) is None


def test_draws_are_averaged() -> None:
    found = Curve.of([points(5.0, 3.0), points(4.0, 2.0)])
    assert found.losses == [4.5, 2.5]
    assert (found.lows, found.highs) == ([4.0, 2.0], [5.0, 3.0])
    assert found.tokens == [0, 100]


def document(**curves: list[dict[str, float]]) -> recovery_report.Document:
    settings = {"model": "m", "train": "t", "validation": "v", "tokens": 210, "window": 10, "batch": 10}
    settings |= {"evaluation_tokens": 40, "learning_rate": 1e-3}
    return {
        "settings": settings,
        "originals": {"0": 3.0},
        "shapes": {"50%": {"mlp": 0.5, "heads": 1.0, "hidden": 0.75}},
        "runs": [
            {"share": 0.5, "arm": arm, "draw": 0, "body": 0.495, "curve": found}
            for arm, found in curves.items()
        ],
    }


def test_the_report_says_who_catches_up_with_whom(tmp_path: Path) -> None:
    made = document(width=points(5.0, 3.6, 3.5), scratch=points(8.0, 6.0, 5.0))
    lines = recovery_report.render(made).splitlines()
    assert "## 50% of the body" in lines
    assert any("trained on 200 tokens" in line for line in lines)
    assert "| width + distillation | 49.5% | 5.0000 | 3.6000 | 3.5000 | 1.7500 | 75% |" in lines
    assert "| from scratch | 49.5% | 8.0000 | 6.0000 | 5.0000 | 2.5000 |  |" in lines
    rows = [line for line in lines if line.startswith("| width + distillation | |")]
    assert not rows
    # Before its first step the cut model is where the other ends.
    assert lines.count("| width + distillation |  | 0 |") == 2
    assert lines.count("| from scratch | never |  |") == 2
    recovery_report.draw_pictures(made, tmp_path)
    picture = tmp_path / "recovery-50.svg"
    first = picture.read_bytes()
    recovery_report.draw_pictures(made, tmp_path)
    assert picture.read_bytes() == first
    assert "](recovery-50.svg)" in "\n".join(lines)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A command line for a tiny model with its text."""
    source = models_zoo.write("llama-tied", tmp_path)
    quantized_models.add_tokenizer(source, models_zoo.VOCABULARY)
    characters = models_zoo.tokens(1, 4000, seed=5)[0].tolist()
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(29 + number) for number in characters).replace(" ", "x"))
    given: dict[str, Any] = {
        "model": source,
        "train": text,
        "validation": text,
        "shares": 0.5,
        "tokens": 256,
        "window": 16,
        "batch": 4,
        "evaluations": 2,
        "evaluation-tokens": 64,
        "samples": 8,
        "trials": 8,
        "threads": 1,
        "work": tmp_path / "work",
        "report": tmp_path / "report",
    }
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def test_all_arms_of_a_tiny_model(words: list[str], tmp_path: Path) -> None:
    recovery.main(words)
    file = tmp_path / "report/recovery.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    runs = {run["arm"]: run for run in found["runs"]}
    assert list(runs) == list(recovery.ARMS)
    assert all(run["body"] <= 0.5 for run in runs.values())
    assert [point["tokens"] for point in runs["width"]["curve"]] == [0, 128, 256]
    # The same cut, judged before the first step; the same shape with other weights.
    assert runs["width"]["curve"][0]["loss"] == runs["fine-tuning"]["curve"][0]["loss"]
    assert len({run["curve"][0]["loss"] for run in runs.values()}) == 4
    here = tmp_path / "work/50%"
    shapes = [
        {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        for model in (AutoModelForCausalLM.from_pretrained(here / f"{arm}-0") for arm in ("width", "scratch"))
    ]
    assert shapes[0] == shapes[1]
    written = (tmp_path / "report/recovery.md").read_text(encoding="utf-8")
    recovery.main(words)
    assert json.loads(file.read_text(encoding="utf-8")) == found
    assert (tmp_path / "report/recovery.md").read_text(encoding="utf-8") == written


def test_figures_of_other_settings_are_not_mixed(words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "report/recovery.json"
    recovery.main([*words, "--arms", "depth"])
    recovery.main([*words, "--arms", "depth", "--draws", "2"])
    assert [run["draw"] for run in json.loads(file.read_text())["runs"]] == [0, 1]
    recovery.main([*words, "--arms", "depth", "--learning-rate", "0.01"])
    assert len(json.loads(file.read_text())["runs"]) == 1
