"""Tasks of lm-evaluation-harness before it is imported: names, files, what is refused, samples.

Nothing here needs the package: its place is taken by a folder of task files and a few stand-ins. What the
real one answers is in ``tests/bench/peer``.
"""

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from compress.bench.metrics import HARNESS, _harness_tasks, described, find, metrics_of
from compress.bench.metrics._columns import Column
from compress.bench.metrics._generation import _ends
from compress.bench.metrics._harness_tasks import HarnessTask, Writing, find_task
from compress.bench.metrics._likelihood import Reader
from compress.bench.metrics.lm_eval import _TEMPLATE, _answers, _column
from compress.core.bench import Bench
from compress.core.errors import CompressError, DataError, EnvironmentFault, ModelError, UsageError
from compress.models.tasks import TASKS
from tests.scored_suites import subject

PIQA = "task: piqa\noutput_type: multiple_choice\nmetric_list:\n  - metric: acc\n"
TASK_FILES = {
    "piqa/piqa.yaml": PIQA,
    "arc/easy.yaml": "# a comment\ninclude: ../piqa/piqa.yaml\n\"task\": 'arc_easy'  # of two\n",
    "functions/own.yaml": PIQA.replace("piqa", "own") + "process_docs: !function utils.process_docs\n",
    "mmlu/mmlu.yaml": "group: mmlu\ntask:\n  - mmlu_stem\n",
    "code/code.yaml": "task: code\nunsafe_code: true\n",
    "seen/seen.yaml": "task: seen\ndoc_to_image: image\n",
    "sampled/sampled.yaml": "task: sampled\ngeneration_kwargs: {do_sample: true, temperature: 0.8}\n",
    "rouge/rouge.yaml": "task: rouge\ngeneration_kwargs: {until: '.'}\nmetric_list: [{metric: rouge}]\n",
}


def aggregation_of(name: str) -> str:
    return f"{name} of the harness"


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A harness with a few tasks."""
    folder = tmp_path / "harness"
    for name, text in TASK_FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(_harness_tasks, "_shipped", lambda: folder)
    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.metrics")}
    registry = ModuleType("lm_eval.api.registry")
    registry.__dict__.update(METRIC_REGISTRY={"acc": len}, get_aggregation=aggregation_of)
    for name, module in {**modules, "lm_eval.api.registry": registry}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return folder


def refused(source: str, *, trusted: bool = False) -> CompressError:
    with pytest.raises(CompressError) as raised:
        find_task(source, trusted=trusted)
    return raised.value


def test_without_the_package_the_hint_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EnvironmentFault, match="lm-eval, which is not installed") as raised:
        metrics_of(TASKS["text-generation"], Bench(suites=("lm-eval:piqa",)))
    assert raised.value.hint == "pip install 'compress-models[lm-eval]'"


def test_an_old_package_is_refused(shipped: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    module = ModuleType("lm_eval")
    module.__spec__ = __import__("importlib.util").util.spec_from_file_location("lm_eval", tmp_path / "a.py")
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.4.9.1")
    refusal = refused("lm-eval:piqa")
    assert refusal.message == "lm-eval 0.4.9.1 is installed, expected 0.4.13 or later"


def test_tasks_are_found_by_name_or_by_file(shipped: Path, tmp_path: Path) -> None:
    assert find_task("lm-eval:piqa", trusted=False) == shipped / "piqa" / "piqa.yaml"
    assert find_task("lm-eval:arc_easy", trusted=False) == shipped / "arc" / "easy.yaml"
    # A function that comes with the harness is as trusted as the harness.
    assert find_task("lm-eval:own", trusted=False) == shipped / "functions" / "own.yaml"
    file = tmp_path / "mine.yaml"
    file.write_text(PIQA)
    assert find_task(f"{HARNESS}{file}", trusted=False) == file.resolve()


@pytest.mark.parametrize(
    ("name", "kind", "message", "hint"),
    [
        ("pika", UsageError, "has no task 'pika'", "did you mean 'piqa'?"),
        ("zzzzzzzz", UsageError, "has no task 'zzzzzzzz'", "lm-eval ls tasks"),
        ("", UsageError, "has no task ''", "lm-eval ls tasks"),
        ("mmlu", UsageError, "lm-eval:mmlu is a group of tasks", "one by one"),
        ("code", UsageError, "runs code that the model writes", ""),
        ("seen", UsageError, "only text is measured", ""),
        ("sampled", UsageError, "lm-eval:sampled: the task has its answers sampled", "do_sample: false"),
        ("rouge", UsageError, "the code of metric 'rouge' lies on the hub", "trust_remote_code: true"),
        ("nowhere/task.yaml", DataError, "there is no task file", "lm-eval:FILE.yaml"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    name: str, kind: type[CompressError], message: str, hint: str, shipped: Path
) -> None:
    refusal = refused(f"lm-eval:{name}")
    assert type(refusal) is kind
    assert message in refusal.message
    assert hint in refusal.hint


def test_code_beside_a_task_runs_only_where_it_is_trusted(shipped: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(PIQA + "doc_to_text: !function utils.prompt\n")
    file = tmp_path / "mine.yaml"
    file.write_text("include: base.yaml\ntask: mine\n")
    refusal = refused(f"lm-eval:{file}")
    assert "runs the Python function utils.prompt" in refusal.message
    assert "trust_remote_code: true" in refusal.hint
    assert find_task(f"lm-eval:{file}", trusted=True) == file.resolve()
    # As a task of the harness it may include the harness's files, functions and all.
    file.write_text(f"include: {shipped / 'functions' / 'own.yaml'}\ntask: mine\n")
    assert find_task(f"lm-eval:{file}", trusted=False) == file.resolve()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "holds list, expected keys and values"),
        ("task: [\n", "cannot be read"),
        ("include: mine.yaml\ntask: a\n", "includes itself"),
        ("output_type: multiple_choice\n", "has no 'task'"),
    ],
)
def test_a_damaged_task_file_says_so(text: str, message: str, shipped: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    refusal = refused(f"lm-eval:{file}")
    assert type(refusal) is DataError
    assert message in refusal.message


def test_writing_is_greedy_or_refused() -> None:
    found = Writing.of(
        {"until": ["\n\n", ".", ""], "max_gen_toks": 8, "do_sample": False, "temperature": 0.7}
    )
    assert found == Writing(8, ("\n\n", "."))
    assert Writing.of({"until": "Q:", "max_new_tokens": 5, "max_tokens": 9}) == Writing(5, ("Q:",))
    assert Writing.of({}) == Writing(256, ())
    assert found.cut("one two") == ("one two", False)
    assert found.cut("one. two\n\nthree") == ("one", True)
    assert found.cut("one\n\ntwo.") == ("one", True)
    with pytest.raises(UsageError, match="sampled"):
        Writing.of({"temperature": 0.5})
    with pytest.raises(UsageError, match="generates with num_beams, repetition_penalty"):
        Writing.of({"repetition_penalty": 1.1, "num_beams": 4})


class FakeTask:
    """What our side asks of a task of the harness."""

    VERSION = 2.0
    OUTPUT_TYPE = "multiple_choice"
    task_name = "two words"

    def __init__(self, documents: list[dict[str, Any]], **config: Any) -> None:
        self.documents = documents
        self.config = {"doc_to_choice": "choices", **config}

    def get_config(self, key: str) -> Any:
        return self.config.get(key)

    def higher_is_better(self) -> dict[str, bool]:
        return {"acc": True, "perplexity": False, "bypass": True}

    def aggregation(self) -> dict[str, str]:
        names = {"acc": "mean", "perplexity": "perplexity", "word": "weighted_perplexity"}
        names |= {"bits": "bits_per_byte", "f1": "f1"}
        return {metric: aggregation_of(name) for metric, name in names.items()}

    def doc_iterator(self, limit: int | None) -> Any:
        return enumerate(self.documents[:limit])

    def doc_to_text(self, document: dict[str, Any]) -> Any:
        return document["text"]

    def doc_to_target(self, document: dict[str, Any]) -> Any:
        return document["target"]

    def doc_to_choice(self, document: dict[str, Any]) -> list[str]:
        return list(document["choices"])


def test_figures_are_named_by_task_filter_and_metric() -> None:
    plain = HarnessTask.of(FakeTask([]))
    assert dict(plain.columns) == {
        "two-words.acc": ("acc", "none"),
        "two-words.perplexity": ("perplexity", "none"),
    }
    filters = [{"name": "strict-match"}, {"name": "none"}]
    filtered = HarnessTask.of(FakeTask([], filter_list=filters))
    assert list(filtered.columns)[::2] == ["two-words.strict-match.acc", "two-words.acc"]
    named = described(["lm_eval.gsm8k.strict-match.exact_match", "suite.a.accuracy"], ["lm_eval"])
    assert {name: quantity.title for name, quantity in named.items()} == {
        "lm_eval.gsm8k.strict-match.exact_match": "gsm8k.strict-match.exact_match, lm-evaluation-harness"
    }
    with pytest.raises(ValueError, match="stands for all tasks"):
        find("lm_eval").measure(None)  # type: ignore[arg-type]


def test_documents_are_questions_with_answers() -> None:
    documents: list[dict[str, Any]] = [
        {"text": "Q", "target": 1, "choices": ["a", "b"]},
        {"text": "Q", "target": "b", "choices": ["a", "b"]},
        {"text": 0, "target": "goes on", "choices": ["he", "she"]},
        {"text": "Q", "target": [0, 1], "choices": ["a", "b"]},
        {"text": "Q", "target": [], "choices": []},
    ]
    suite = HarnessTask.of(FakeTask(documents)).examples(None)
    found = [(example.question, example.answers) for example in suite.examples]  # type: ignore[union-attr]
    expected = [("Q", ("b",)), ("Q", ("b",)), ("goes on", ("he",)), ("Q", ("a", "b")), ("Q", ("",))]
    assert found == expected
    assert suite.digest == HarnessTask.of(FakeTask(documents)).examples(9).digest
    assert suite.digest != HarnessTask.of(FakeTask(documents)).examples(4).digest


def test_samples_add_up_to_the_harness_s_figure(shipped: Path) -> None:
    task = FakeTask([])

    def column(metric: str, values: list[Any], whole: Any = None) -> Column:
        return _column(_TEMPLATE, task, metric, [{metric: value} for value in values], whole)

    assert column("acc", [1, 0.0, np.float64(1)]).samples == (1.0, 0.0, 1.0)
    assert column("perplexity", [-2.0]) == Column(_TEMPLATE, (2.0,), "exponential-mean")
    assert column("word", [(-6.0, 3)]) == Column(_TEMPLATE, (2.0,), "exponential-mean", (3.0,))
    bits = column("bits", [(-6.0, 3)])
    assert (bits.samples[0], bits.summary, bits.weights) == (2 / math.log(2), "mean", (3.0,))
    assert "'f1' (0.25) from all documents at once" in str(column("f1", [(1, 0)], 0.25).reason)
    assert "no number as 'acc'" in str(column("acc", [(1, 2)]).reason)
    assert "gives no 'f2'" in str(_column(_TEMPLATE, task, "f2", [{"acc": 1}], None).reason)
    assert "gives no 'acc'" in str(_column(_TEMPLATE, task, "acc", [], None).reason)


def test_answers_are_kept_where_they_are_right_or_wrong() -> None:
    task = FakeTask([])
    right = Column(_TEMPLATE, (1.0,))
    document = {"choices": ["one", "eleven"]}
    row = {"doc": document, "filtered_resps": [(-3.0, False), (-4.0, True)], "arguments": [("a", " b")]}
    assert _answers(task, "acc", [row], {}, right) == ["one"]
    assert _answers(task, "acc_norm", [row], {}, right) == ["eleven"]
    assert _answers(task, "acc_bytes", [row], {}, right) == ["eleven"]
    assert _answers(task, "exact_match", [row], {}, right) is None
    assert _answers(task, "acc", [row], {}, Column(_TEMPLATE, (0.5,))) is None
    task.OUTPUT_TYPE = "loglikelihood"
    assert _answers(task, "acc", [row], {("a", " b"): " c"}, right) == [" c"]
    task.OUTPUT_TYPE = "generate_until"
    assert _answers(task, "exact_match", [{"filtered_resps": ["said"]}], {}, right) == ["said"]


def test_a_model_may_have_several_last_tokens(before: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in before.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    given = subject(folder)
    end = Reader.of(given).tokenizer.eos_token_id
    settings = folder / "generation_config.json"
    settings.write_text(f'{{"eos_token_id": [{end}, 7]}}')
    assert _ends(given, Reader.of(given)) >= {end, 7}
    settings.write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read"):
        _ends(given, Reader.of(given))
