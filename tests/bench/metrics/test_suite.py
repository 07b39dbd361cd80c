"""Scores of suites against direct computations, one example and one token at a time."""

import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from compress.bench.metrics import Subject, described, find, metrics_of
from compress.bench.metrics._classification import calibration_error, macro
from compress.bench.metrics._likelihood import Reader, likelihoods
from compress.bench.metrics._text_scores import bleu, exact_match, normalized, rouge, token_f1, word_errors
from compress.core.bench import Bench
from compress.core.errors import DataError, UsageError
from compress.models.tasks import TASKS
from tests import models_zoo, quantized_models
from tests.scored_suites import score, subject, write

CHOICES = [
    {"query": "The fox ", "choices": ["runs", "sleeps all day", "é"], "gold": 0},
    {"query": "A dog", "choices": ["x", "y"], "gold": 1},
    {"query": "A dog", "choices": ["x", "yy", "zzz"], "gold": 2},
    {"query": "", "choices": ["one", "two"], "gold": 0},
    {"query": "long " * 30, "choices": ["b", "c d"], "gold": 1},
]
CLOZES = [
    {"context": "The quick brown", "continuation": "fox"},
    {"context": "jumps over ", "continuation": " the dog"},
    {"context": "word " * 20, "continuation": "z"},
]


def log_probabilities(folder: Path, tokens: list[int]) -> torch.Tensor:
    """In double precision, ``[length, vocabulary]``."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return found


def direct(folder: Path, context: str, continuation: str, positions: int = 64) -> tuple[float, list[int]]:
    """Nats of a continuation, and the most likely token at each of its places; characters are tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    before = tokenizer(bare)["input_ids"] if bare else [tokenizer.bos_token_id]
    after = tokenizer(continuation)["input_ids"]
    inputs = [*before, *after][-(positions + 1) :][:-1]
    rows = log_probabilities(folder, inputs)[-len(after) :]
    nats = sum(float(row[token]) for row, token in zip(rows, after, strict=True))
    return nats, rows.argmax(-1).tolist()


def test_multiple_choice(before: Path, tmp_path: Path) -> None:
    found = score(before, write(tmp_path / "quiz.jsonl", CHOICES), scoring_batch_size=2)
    ways: dict[str, Any] = {
        "accuracy": lambda choice: 1,
        "accuracy_per_byte": lambda choice: len(choice.encode()),
        "accuracy_per_character": len,
    }
    assert set(found) == set(ways)
    for name, length in ways.items():
        chosen = []
        for example in CHOICES:
            scores = [direct(before, example["query"], f" {c}")[0] / length(c) for c in example["choices"]]
            chosen.append(scores.index(max(scores)))
        assert found[name].answers == tuple(map(str, chosen))
        right = [float(one == example["gold"]) for one, example in zip(chosen, CHOICES, strict=True)]
        assert found[name].samples == tuple(right)
        assert found[name].value == pytest.approx(sum(right) / len(right))
        assert found[name].clusters is None
    protocol = found["accuracy"].conditions["protocol"]
    assert protocol["examples"] == len(CHOICES)
    assert protocol["longest"] == 64


def test_cloze(before: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(before)
    found = score(before, write(tmp_path / "cloze.jsonl", CLOZES))
    nats, right = [], []
    for example in CLOZES:
        text = example["continuation"]
        text = text if text[0] == " " else f" {text}"
        likelihood, best = direct(before, example["context"], text)
        given = tokenizer(example["context"][len(example["context"].rstrip()) :] + text)["input_ids"]
        nats.append(-likelihood)
        right.append(float(best == given))
    assert found["perplexity"].samples == pytest.approx(nats, rel=1e-5)
    assert found["perplexity"].value == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)
    assert found["accuracy"].samples == tuple(right)


def test_what_the_model_itself_would_write_is_right(before: Path) -> None:
    given = subject(before)
    text = written(before, "Once", 4)
    found = likelihoods(
        given, Reader.of(given), [("Once", text), ("Once", text[:-1] + "~"), ("Once", text[:2])]
    )
    assert [one.greedy for one in found] == [True, False, True]
    assert found[0].choice == found[1].choice
    assert found[0].nats == pytest.approx(direct(before, "Once", text)[0], rel=1e-5)


def test_special_tokens_are_the_tokenizer_s_own(shared: Path) -> None:
    reader = Reader.of(subject(shared / "models" / "stories260K"))
    assert reader.encode("Once")[0] == reader.tokenizer.bos_token_id
    assert reader.encode("<s>Once").count(reader.tokenizer.bos_token_id) == 1
    before, after = reader.pair("Once upon", " a time")
    assert [*before, *after] == reader.tokenizer("Once upon a time")["input_ids"]
    assert reader.pair("", "a")[0] == [reader.tokenizer.bos_token_id]
    assert reader.pair("One ", "two") == reader.pair("One", " two")


def test_what_cannot_be_scored_says_so(before: Path, tmp_path: Path) -> None:
    long = score(before, write(tmp_path / "long.jsonl", [{"context": "a", "continuation": "b" * 65}]))
    assert "a continuation of 66 tokens, and the model reads 64 at once" in str(long["accuracy"].reason)
    labels = score(before, write(tmp_path / "labels.jsonl", [{"text": "a", "label": 1}]))
    assert "need a classifier" in str(labels["f1"].reason)
    questions = write(tmp_path / "qa.jsonl", [{"question": "q", "context": "", "answers": ["a"]}])
    assert "leave no room" in str(score(before, questions)["exact_match"].reason)
    model = transformers.AutoModelForCausalLM.from_pretrained(before)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    model.save_pretrained(tmp_path / "nan")
    quantized_models.add_tokenizer(tmp_path / "nan", models_zoo.VOCABULARY)
    quiz = write(tmp_path / "quiz.jsonl", CHOICES)
    assert "NaN" in str(score(tmp_path / "nan", quiz)["accuracy"].reason)
    assert "NaN" in str(score(tmp_path / "nan", questions, generated_tokens=4)["exact_match"].reason)


def written(folder: Path, prompt: str, tokens: int) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(prompt)["input_ids"][-(64 - tokens) :]
    made: list[int] = []
    while len(made) < tokens:
        token = int(log_probabilities(folder, [*given, *made])[-1].argmax())
        if token == tokenizer.eos_token_id:
            break
        made.append(token)
    return str(tokenizer.decode(made, skip_special_tokens=True)).strip()


def test_question_answering(before: Path, tmp_path: Path) -> None:
    contexts = ["The fox runs.", "Dogs sleep."]
    prompts = [f"Context: {context}\n\nQuestion: Who?\n\nAnswer:" for context in contexts]
    expected = [written(before, prompt, 6) for prompt in prompts]
    examples = [
        {"question": "Who?", "context": contexts[0], "answers": ["nobody", expected[0]]},
        {"question": "Who?", "context": contexts[1], "answers": ["a cat"]},
    ]
    found = score(before, write(tmp_path / "qa.jsonl", examples), generated_tokens=6)
    assert found["exact_match"].answers == tuple(expected)
    assert found["exact_match"].samples[0] == 1.0
    assert found["token_f1"].samples[0] == 1.0
    assert found["exact_match"].conditions["protocol"]["generated"] == 6


def test_generation(before: Path, tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    sources = ["The fox", "A dog and a cat", "The box"]
    suite = write(tmp_path / "mt.jsonl", [{"source": s, "reference": "the fox runs"} for s in sources])
    found = score(before, suite, generated_tokens=5)
    said = [written(before, source, 5) for source in sources]
    for name, samples in rouge(said, ["the fox runs"] * 3).items():
        assert found[name].samples == pytest.approx(samples)
    assert found["word_error_rate"].weights == (3.0, 3.0, 3.0)


def test_squad_s_scores() -> None:
    assert normalized("The  quick, brown fox!") == "quick brown fox"
    assert exact_match("the Fox.", ["dog", "fox"]) == 1.0
    assert exact_match("a foxes", ["fox"]) == 0.0
    assert token_f1("the quick fox", ["dog", "quick brown fox"]) == pytest.approx(
        2 * 1 * (2 / 3) / (1 + 2 / 3)
    )
    assert token_f1("", ["the"]) == 1.0
    assert token_f1("", ["fox"]) == 0.0


def test_texts_are_compared_by_libraries() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    said = ["the cat sat on the mat", "there is a dog in the house", "hello"]
    wanted = ["the cat sat on a mat", "there is a dog in our old house", "hello world out there"]
    samples = bleu(said, wanted)
    assert np.mean(samples) == pytest.approx(sacrebleu.corpus_bleu(said, [wanted]).score)
    without = [
        sacrebleu.corpus_bleu(said[:i] + said[i + 1 :], [wanted[:i] + wanted[i + 1 :]]).score
        for i in range(3)
    ]
    assert np.diff(samples) == pytest.approx(-2 * np.diff(without))
    assert bleu(said[:1], wanted[:1]) == pytest.approx([sacrebleu.corpus_bleu(said[:1], [wanted[:1]]).score])
    rates, words = word_errors(["a b c", ""], ["a x c d", "one two"])
    assert rates == pytest.approx([2 / 4, 1.0])
    assert words == [4.0, 2.0]
    assert rouge(["a b"], ["a b c d"])["rouge1"] == pytest.approx([2 * 1 * 0.5 / 1.5])


def test_a_missing_package_is_a_reason(before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sacrebleu", "jiwer", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    found = score(
        before, write(tmp_path / "mt.jsonl", [{"source": "The", "reference": "x"}]), generated_tokens=2
    )
    assert found["bleu"].reason == "the package sacrebleu is missing: install compress-models[suites]"
    assert "jiwer" in str(found["word_error_rate"].reason)
    assert "rouge_score" in str(found["rougeL"].reason)


def brute_macro(gold: list[int], chosen: list[int], classes: list[int]) -> dict[str, float]:
    scores: dict[str, list[float]] = {"precision": [], "recall": [], "f1": []}
    for one in classes:
        right = sum(a == b == one for a, b in zip(gold, chosen, strict=True))
        precision = right / chosen.count(one) if one in chosen else 0.0
        recall = right / gold.count(one) if one in gold else 0.0
        scores["precision"].append(precision)
        scores["recall"].append(recall)
        scores["f1"].append(2 * precision * recall / (precision + recall) if right else 0.0)
    return {name: sum(values) / len(values) for name, values in scores.items()}


def brute_calibration(confidence: list[float], right: list[float]) -> float:
    error = 0.0
    for number in range(15):
        inside = [
            (c, r) for c, r in zip(confidence, right, strict=True) if number / 15 < c <= (number + 1) / 15
        ]
        if inside:
            gap = sum(r for _, r in inside) / len(inside) - sum(c for c, _ in inside) / len(inside)
            error += len(inside) / len(right) * abs(gap)
    return error


def pseudo_values(whole: float, without: list[float]) -> list[float]:
    """What `influence` promises, written out."""
    values = [len(without) * whole - (len(without) - 1) * one for one in without]
    return [whole + value - sum(values) / len(values) for value in values]


def test_macro_scores_and_calibration_error_by_counting() -> None:
    generator = np.random.default_rng(0)
    gold, chosen = generator.integers(0, 4, 30), generator.integers(1, 5, 30)
    classes = sorted({*gold.tolist(), *chosen.tolist()})
    whole = brute_macro(gold.tolist(), chosen.tolist(), classes)
    without = [
        brute_macro(np.delete(gold, i).tolist(), np.delete(chosen, i).tolist(), classes) for i in range(30)
    ]
    for name, samples in macro(gold, chosen).items():
        assert np.mean(samples) == pytest.approx(whole[name])
        assert samples == pytest.approx(pseudo_values(whole[name], [one[name] for one in without]))
    confidence, right = generator.uniform(0.2, 1.0, 30), generator.integers(0, 2, 30).astype(float)
    error = brute_calibration(confidence.tolist(), right.tolist())
    errors = [
        brute_calibration(np.delete(confidence, i).tolist(), np.delete(right, i).tolist()) for i in range(30)
    ]
    assert calibration_error(confidence, right) == pytest.approx(pseudo_values(error, errors))
    assert calibration_error(np.array([1.0, 0.5]), np.array([1.0, 1.0])) == pytest.approx([0.0, 0.5])
    assert macro(np.array([1]), np.array([1])) == {"precision": [1.0], "recall": [1.0], "f1": [1.0]}


def test_classification(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(models_zoo.configuration("bert"))
    model.config.id2label, model.config.label2id = {0: "poor", 1: "fine"}, {"poor": 0, "fine": 1}
    with torch.no_grad():
        model.classifier.weight.mul_(40)
    model.save_pretrained(tmp_path / "bert")
    folder = quantized_models.add_tokenizer(tmp_path / "bert", models_zoo.VOCABULARY)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["good", "bad thing", "fine day", "poor show", "a"]
    labels: list[int | str] = [0, 1, "poor", "1", 0]
    with torch.no_grad():
        probabilities = torch.cat(
            [model.eval()(torch.tensor([tokenizer(text)["input_ids"]])).logits.softmax(-1) for text in texts]
        )
    examples = [{"text": t, "label": n} for t, n in zip(texts, labels, strict=True)]
    found = score(folder, write(tmp_path / "senti.jsonl", examples))
    chosen, gold = probabilities.argmax(-1).tolist(), [0, 1, 0, 1, 0]
    right = [float(a == b) for a, b in zip(chosen, gold, strict=True)]
    assert found["accuracy"].samples == tuple(right)
    assert found["accuracy"].answers == tuple(map(str, chosen))
    expected = brute_macro(gold, chosen, sorted(Counter([*gold, *chosen])))
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value)
    error = brute_calibration(probabilities.max(-1).values.tolist(), right)
    assert found["calibration_error"].value == pytest.approx(error, abs=1e-6)
    unknown = score(folder, write(tmp_path / "odd.jsonl", [{"text": "a", "label": "angry"}]))
    assert "label 'angry' is no number and no label" in str(unknown["accuracy"].reason)
    beyond = score(folder, write(tmp_path / "beyond.jsonl", [{"text": "a", "label": 2}]))
    assert "label 2, and the model knows 2 labels" in str(beyond["accuracy"].reason)
    quiz = score(folder, write(tmp_path / "quiz.jsonl", CHOICES))
    assert quiz["accuracy"].reason == "the suite needs a language model, and this is a sequence classifier"


def test_suites_are_metrics_by_name(tmp_path: Path) -> None:
    quiz = str(write(tmp_path / "quiz.jsonl", CHOICES))
    (tmp_path / "other").mkdir()
    same = str(write(tmp_path / "other" / "quiz.jsonl", CHOICES))
    task = TASKS["text-generation"]
    names = metrics_of(task, Bench(suites=(quiz,)))
    assert names == (*task.metrics, f"suite:{quiz}")
    metric = find(names[-1])
    assert set(metric.missing("why")) == {
        "suite.quiz.accuracy",
        "suite.quiz.accuracy_per_byte",
        "suite.quiz.accuracy_per_character",
    }
    with pytest.raises(UsageError, match="both called 'quiz'"):
        metrics_of(task, Bench(suites=(quiz, same)))
    with pytest.raises(DataError, match="no text at"):
        metrics_of(task, Bench(suites=(str(tmp_path / "missing.jsonl"),)))
    known = described(["suite.gone.accuracy", "perplexity", "other"], ["perplexity", "suite"])
    assert list(known) == ["perplexity", "suite.gone.accuracy"]
    assert known["suite.gone.accuracy"].title == "gone, accuracy"
    assert known["suite.gone.accuracy"].better == "higher"


def test_a_limit_takes_the_first_examples(before: Path, tmp_path: Path) -> None:
    quiz = write(tmp_path / "quiz.jsonl", CHOICES)
    few = score(before, quiz, suite_limit=2)["accuracy"]
    everything = score(before, quiz)["accuracy"]
    assert few.samples == everything.samples[:2]
    assert few.conditions != everything.conditions


def test_no_source_measures_nothing(before: Path) -> None:
    given: Subject = subject(before)
    with pytest.raises(ValueError, match="stands for all suites"):
        find("suite").measure(given)
