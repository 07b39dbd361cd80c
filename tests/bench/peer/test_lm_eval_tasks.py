"""Tasks of lm-evaluation-harness on our sessions against the harness's own model, document by document.

Needs ``pip install 'compress-models[lm-eval]'``; COMPRESS_LM_EVAL_PYTHON may name another Python for the
harness's side.
"""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from compress.bench.experiment import compare
from compress.bench.metrics import examples_of, find, metrics_of, quantities
from compress.core.bench import Bench
from compress.core.errors import EnvironmentFault, UsageError
from compress.core.measurement import Measurement
from compress.data.corpora import documents
from compress.models.tasks import TASKS
from tests import quantized_models, scored_suites
from tests.bench.fabricated import SMALL, one_by_one
from tests.bench.peer.test_lm_eval import CERTAIN
from tests.bench.test_experiment import in_process

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
pytestmark = [
    pytest.mark.peer,
    # Of packages that the harness imports.
    pytest.mark.filterwarnings("ignore"),
]

SCRIPT = Path(__file__).with_name("lm_eval_samples.py")
DOCUMENTS = 50
CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes", "brier_score")],
}
CONTINUED = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{' ' + continuation}}",
    "metric_list": [{"metric": name} for name in ("perplexity", "acc")],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "text",
    "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
}
WRITTEN = {
    "output_type": "generate_until",
    "doc_to_text": "{{text[:400]}}",
    "doc_to_target": "{{text[400:420]}}",
    "generation_kwargs": {"until": [".", "\n\n"], "max_gen_toks": 24, "do_sample": False},
    "filter_list": [
        {"name": "whole", "filter": [{"function": "take_first"}]},
        {
            "name": "word",
            "filter": [
                {"function": "regex", "regex_pattern": "(\\w+)", "fallback": "none"},
                {"function": "take_first"},
            ],
        },
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
TASKS_OF_LINES = {
    "piqa": {**CHOICES, "metadata": {"version": 2.5}},
    "arc_easy": {**CHOICES, "num_fewshot": 2, "fewshot_split": "test"},
    "lambada_openai": CONTINUED,
    "stories": ROLLING,
    "written": WRITTEN,
}


@pytest.fixture(scope="module", autouse=True)
def _data_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def tasks(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tasks")
    texts = documents(str(shared / "data" / "tinystories_sample.txt"), limit=24).texts
    texts = ("\n".join(texts[:5]), *texts[5:])
    lines = {name: [json.dumps({"text": text}) + "\n" for text in texts] for name in ("stories", "written")}
    found = {}
    for name, task in TASKS_OF_LINES.items():
        if name not in lines:
            file = shared / "data" / "lm_tasks" / f"{name}.jsonl.gz"
            with gzip.open(file, "rt", encoding="utf-8") as stream:
                lines[name] = stream.readlines()[:DOCUMENTS]
        if name == "lambada_openai":
            # Small models never guess a last word of LAMBADA; these they do.
            certain = [
                {"context": context, "continuation": word}
                for context, word in (*CERTAIN, ("in the middle", "of the"))
            ]
            lines[name] += [json.dumps(record) + "\n" for record in certain]
        data = folder / f"{name}.jsonl"
        data.write_text("".join(lines[name]), encoding="utf-8")
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        found[name] = folder / f"{name}.yaml"
        found[name].write_text(yaml.safe_dump({"task": name, **source, "test_split": "test", **task}))
    return found


def harness(model: Path, tasks: dict[str, Path], folder: Path) -> dict[str, Any]:
    python = os.environ.get("COMPRESS_LM_EVAL_PYTHON") or sys.executable
    out = folder / "samples.json"
    command = [python, str(SCRIPT), str(model), str(out), *map(str, tasks.values())]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4_000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def measured(model: Path, tasks: dict[str, Path]) -> dict[str, Measurement]:
    sources = tuple(f"lm-eval:{file}" for file in tasks.values())
    subject = scored_suites.subject(model, suites=sources)
    named = [name for name in metrics_of(subject.task, subject.options) if name.startswith("lm_eval:")]
    assert len(named) == len(tasks)
    return {name: value for metric in named for name, value in find(metric).measure(subject).items()}


@pytest.mark.parametrize("model", ["stories260K", "gutenberg-4m"])
def test_every_document_is_scored_as_by_the_harness(
    model: str, shared: Path, tasks: dict[str, Path], tmp_path: Path
) -> None:
    folder = shared / "models" / model
    theirs = harness(folder, tasks, tmp_path)
    ours = measured(folder, tasks)
    for name in ("piqa", "arc_easy"):
        rows = theirs["samples"][name]
        assert len(rows) == DOCUMENTS
        for metric in ("acc", "acc_norm", "acc_bytes"):
            assert ours[f"lm_eval.{name}.{metric}"].samples == tuple(float(row[metric]) for row in rows)
        choices = [
            json.loads(line)["choices"] for line in tasks[name].with_suffix(".jsonl").read_text().splitlines()
        ]
        chosen = [int(np.argmax([one[0] for one in row["filtered_resps"]])) for row in rows]
        expected = tuple(of[at] for of, at in zip(choices, chosen, strict=True))
        assert ours[f"lm_eval.{name}.acc"].answers == expected
        assert "from all documents at once" in str(ours[f"lm_eval.{name}.brier_score"].reason)
    rows = theirs["samples"]["lambada_openai"]
    nats = [-row["perplexity"] for row in rows]
    assert ours["lm_eval.lambada_openai.perplexity"].samples == pytest.approx(nats, rel=1e-6, abs=1e-4)
    right = ours["lm_eval.lambada_openai.acc"].samples
    assert right == tuple(float(row["acc"]) for row in rows)
    assert sum(right) > 0
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        expected_value = theirs["results"]["stories"][f"{metric},none"]
        assert ours[f"lm_eval.stories.{metric}"].value == pytest.approx(expected_value, rel=1e-6)
        assert ours[f"lm_eval.stories.{metric}"].better == "lower"
    for kept in ("whole", "word"):
        rows = [row for row in theirs["samples"]["written"] if row["filter"] == kept]
        found = ours[f"lm_eval.written.{kept}.exact_match"]
        assert found.answers == tuple(row["filtered_resps"][0] for row in rows)
        assert found.samples == tuple(float(row["exact_match"]) for row in rows)
    assert len(set(ours["lm_eval.written.whole.exact_match"].answers or ())) > 5
    for name in theirs["results"]:
        agreed = {key: value for key, value in theirs["results"][name].items() if isinstance(value, float)}
        print(f"{model}, {name}: {agreed}")  # noqa: T201


def test_direction_and_protocol_are_the_task_s(shared: Path, tasks: dict[str, Path]) -> None:
    folder = shared / "models" / "stories260K"
    subject = scored_suites.subject(folder, suite_limit=4)
    known = quantities([f"lm_eval:{tasks['lambada_openai']}"])
    assert {name: one.better for name, one in known.items()} == {
        "lm_eval.lambada_openai.perplexity": "lower",
        "lm_eval.lambada_openai.acc": "higher",
    }
    found = find(f"lm_eval:{tasks['piqa']}").measure(subject)["lm_eval.piqa.acc"]
    protocol = found.conditions["protocol"]
    assert (protocol["version"], protocol["few_shot"], protocol["examples"]) == ("2.5", 0, 4)
    shots = find(f"lm_eval:{tasks['arc_easy']}").measure(subject)["lm_eval.arc_easy.acc"]
    assert shots.conditions["protocol"]["few_shot"] == 2
    suite = examples_of(f"lm-eval:{tasks['piqa']}", Bench(suite_limit=4))
    assert suite.digest == protocol["suite"]
    assert len(suite.examples) == 4


def test_an_experiment_says_which_answers_flipped(
    shared: Path, text: Path, tasks: dict[str, Path], tmp_path: Path
) -> None:
    before = shared / "models" / "stories260K"
    after = quantized_models.write(before, tmp_path / "int4", bits=3, group=None)
    results = compare(
        before,
        [after],
        tmp_path / "out",
        str(text),
        gates=[{"metric": "lm_eval.piqa.acc", "test": "non-inferiority", "margin": 0.9}],
        options={**SMALL, "suites": [f"lm-eval:{tasks['piqa']}"], "suite_limit": 30},
        runner=one_by_one(in_process),
    )
    assert [judgement.verdict for judgement in results.judgements] == ["PASS"]
    flips = {each.metric: each for each in results.flips}
    assert flips["lm_eval.piqa.acc"].examples == 30
    questions = [json.loads(line)["query"] for line in tasks["piqa"].with_suffix(".jsonl").open()]
    for flip in flips["lm_eval.piqa.acc_norm"].shown:
        assert flip.question == questions[flip.example][:300]
    assert "piqa.acc, lm-evaluation-harness" in (tmp_path / "out" / "report.md").read_text()


def test_a_metric_of_the_hub_is_not_trusted(tasks: dict[str, Path]) -> None:
    file = tasks["written"].with_name("elsewhere.yaml")
    task = yaml.safe_load(tasks["written"].read_text())
    for metric in ({"metric": "rouge"}, {"metric": "exact_match", "hf_evaluate": True}):
        file.write_text(yaml.safe_dump({**task, "metric_list": [metric]}))
        with pytest.raises(UsageError, match="lies on the hub"):
            metrics_of(TASKS["text-generation"], Bench(suites=(f"lm-eval:{file}",)))


def test_data_that_cannot_be_had_are_missed_at_once(tasks: dict[str, Path]) -> None:
    file = tasks["piqa"].with_name("far.yaml")
    task = {**yaml.safe_load(tasks["piqa"].read_text()), "dataset_path": "nobody/has-this", "task": "far"}
    file.write_text(yaml.safe_dump({**task, "dataset_kwargs": {}}))
    with pytest.raises(EnvironmentFault, match="the data of task far"):
        metrics_of(TASKS["text-generation"], Bench(suites=(f"lm-eval:{file}",)))
