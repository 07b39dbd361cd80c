"""The answer to every example is that of lm-evaluation-harness, which runs in an environment of its own.

Set COMPRESS_LM_EVAL_PYTHON to a Python that has lm-eval 0.4.13 (or later) and torch, and
COMPRESS_LM_EVAL_LIMIT to the examples of each suite (0 for all).
"""

import gzip
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import scored_suites

pytestmark = pytest.mark.peer

SCRIPT = Path(__file__).with_name("lm_eval_answers.py")
SUITES = ("piqa", "arc_easy", "lambada_openai")
CERTAIN = (
    ("Once upon a", "time"),
    ("Once upon a time, there was a little", "girl"),
    ("She loved to play in the", "park"),
    ("as well", "as"),
    ("it was the best of times, it was the worst", "of times"),
)
MODELS = ("gutenberg-4m", "stories260K", "random-gpt2")


def random_gpt2(shared: Path, folder: Path) -> Path:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    for file in (shared / "tokenizers" / "gpt2").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def suites(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    limit = int(os.environ.get("COMPRESS_LM_EVAL_LIMIT", "100")) or None
    folder = tmp_path_factory.mktemp("suites")
    found = {}
    for name in SUITES:
        with gzip.open(shared / "data" / "lm_tasks" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as stream:
            lines = stream.readlines()[:limit]
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(lines), encoding="utf-8")
    # Small models never guess a last word of LAMBADA; these they do.
    certain = [{"context": context, "continuation": word} for context, word in CERTAIN]
    found["certain"] = scored_suites.write(folder / "certain.jsonl", certain)
    return found


def answers_of_harness(model: Path, suites: dict[str, Path], folder: Path) -> dict[str, list[dict[str, Any]]]:
    python = os.environ.get("COMPRESS_LM_EVAL_PYTHON")
    if not python:
        pytest.skip("needs COMPRESS_LM_EVAL_PYTHON, a Python with lm-eval and torch")
    out = folder / "answers.json"
    command = [python, str(SCRIPT), str(model), str(out), *map(str, suites.values())]
    environment = {**os.environ, "HF_HOME": str(folder / "home")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4_000:]
    found: dict[str, list[dict[str, Any]]] = json.loads(out.read_text())["answers"]
    return found


@pytest.mark.parametrize("model", MODELS)
def test_every_answer_is_the_harness_s(
    model: str, shared: Path, suites: dict[str, Path], tmp_path: Path
) -> None:
    folder = random_gpt2(shared, tmp_path / model) if model == "random-gpt2" else shared / "models" / model
    theirs = answers_of_harness(folder, suites, tmp_path)
    for name, file in suites.items():
        ours = scored_suites.score(folder, file)
        expected = theirs[name]
        right = [float(answer["acc"]) for answer in expected]
        agreed = sum(a == b for a, b in zip(ours["accuracy"].samples, right, strict=True))
        print(f"{model}, {name}: {agreed} of {len(right)} agree, accuracy {ours['accuracy'].value:.4f}")  # noqa: T201
        assert ours["accuracy"].samples == tuple(right)
        if "perplexity" in ours:
            nats = [-answer["nats"][0] for answer in expected]
            assert ours["perplexity"].samples == pytest.approx(nats, rel=1e-5, abs=1e-4)
            continue
        chosen = tuple(str(int(np.argmax(answer["nats"]))) for answer in expected)
        assert ours["accuracy"].answers == chosen
        for quantity, key in (("accuracy_per_character", "acc_norm"), ("accuracy_per_byte", "acc_bytes")):
            assert ours[quantity].samples == tuple(float(answer[key]) for answer in expected)
