"""Perplexity, divergence, accuracy and cosine against direct computations in double precision."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.bench.material import prepare
from compress.bench.metrics import Subject, find
from compress.core.artifact import Artifact
from compress.core.bench import Bench
from compress.core.measurement import Measurement
from compress.data.corpora import documents
from compress.models.tasks import resolve
from compress.runtimes import Placement
from compress.runtimes import find as find_runtime
from tests import models_zoo, quantized_models


def measured(
    folder: Path, text: str, metric: str, *, reference: Path | None = None, task: str = "auto", **options: Any
) -> dict[str, Measurement]:
    settings = Bench(**options)
    artifact = Artifact.open(folder)
    work = resolve(task, artifact.config)
    eager = find_runtime("torch-eager")
    placement = Placement(dtype="float32")
    subject = Subject(
        artifact=artifact,
        task=work,
        options=settings,
        session=eager.load(artifact, work, placement),
        reference=eager.load(Artifact.open(reference), work, placement) if reference else None,
        material=prepare(artifact, work, documents(text), settings),
    )
    return find(metric).measure(subject)


def logits_of(folder: Path, sequences: list[list[int]]) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        return [model(torch.tensor([sequence])).logits[0].double() for sequence in sequences]


def test_perplexity_of_windows(before: Path, text: Path) -> None:
    joined = "\n\n".join(documents(str(text)).texts)
    tokens = AutoTokenizer.from_pretrained(before)(joined, add_special_tokens=False)["input_ids"]
    windows = [tokens[start : start + 32] for start in range(0, len(tokens) - 31, 32)]
    losses = [
        -float(logits[position].log_softmax(-1)[window[position + 1]])
        for window, logits in zip(windows, logits_of(before, windows), strict=True)
        for position in range(31)
    ]
    found = measured(before, str(text), "perplexity", window=32)["perplexity"]
    assert found.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    assert len(found.samples) == len(windows)
    assert found.conditions["protocol"]["targets"] == len(losses)


def test_perplexity_of_documents_weighs_every_target_alike(before: Path, text: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(before)
    texts = documents(str(text)).texts
    sequences = [[1, *tokenizer(each, add_special_tokens=False)["input_ids"]][:40] for each in texts]
    total, count = 0.0, 0
    for sequence, logits in zip(sequences, logits_of(before, sequences), strict=True):
        targets = torch.tensor(sequence[1:])
        total -= float(logits[:-1].log_softmax(-1).gather(1, targets[:, None]).sum())
        count += len(targets)
    found = measured(before, str(text), "perplexity", protocol="documents", window=40)["perplexity"]
    assert found.value == pytest.approx(math.exp(total / count), rel=1e-6)


def test_perplexity_of_second_halves(before: Path, text: Path) -> None:
    """llama.cpp's: of 32 tokens, the first replaced, positions 16 to 30 predict 17 to 31."""
    joined = "\n\n".join(documents(str(text)).texts)
    tokens = [1, *AutoTokenizer.from_pretrained(before)(joined, add_special_tokens=False)["input_ids"]]
    windows = [[1, *tokens[start + 1 : start + 32]] for start in range(0, len(tokens) - 31, 32)]
    losses = [
        -float(logits[position].log_softmax(-1)[window[position + 1]])
        for window, logits in zip(windows, logits_of(before, windows), strict=True)
        for position in range(16, 31)
    ]
    found = measured(before, str(text), "perplexity", protocol="llama.cpp", window=32, bos=True)["perplexity"]
    assert found.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    assert found.conditions["protocol"]["targets"] == len(losses) == 15 * len(windows)


@pytest.mark.parametrize("window", [7, 64])
def test_perplexity_of_rolling_windows(before: Path, text: Path, window: int) -> None:
    """Each target with its context by definition, one forward pass a target; 64 are all positions."""
    tokenizer = AutoTokenizer.from_pretrained(before)
    texts = documents(str(text)).texts[:2]
    total, targets = 0.0, 0
    for each in texts:
        tokens = tokenizer(each)["input_ids"]
        whole = len(tokens) // window * window
        contexts = []
        for at in range(len(tokens)):
            if at < window:
                contexts.append([1, *tokens[:at]])
            elif at < whole:
                contexts.append(tokens[at // window * window - 1 : at])
            else:
                contexts.append(tokens[len(tokens) - window - 1 : at])
        assert max(map(len, contexts)) == window
        for target, logits in zip(tokens, logits_of(before, contexts), strict=True):
            total -= float(logits[-1].log_softmax(-1)[target])
        targets += len(tokens)
    short = text.parent / "two.txt"
    short.write_text("<|endoftext|>".join(texts))
    found = measured(before, str(short), "perplexity", protocol="lm-eval", window=window)
    words, octets = sum(len(each.split()) for each in texts), sum(len(each.encode()) for each in texts)
    assert found["perplexity"].value == pytest.approx(math.exp(total / targets), rel=1e-6)
    assert found["perplexity.word"].value == pytest.approx(math.exp(total / words), rel=1e-5)
    assert found["perplexity.byte"].value == pytest.approx(math.exp(total / octets), rel=1e-6)
    assert found["perplexity.bits_per_byte"].value == pytest.approx(total / octets / math.log(2), rel=1e-6)
    assert found["perplexity.word"].conditions["protocol"]["words"] == words
    assert found["perplexity"].conditions["protocol"]["targets"] == targets


def test_only_rolling_windows_count_words(before: Path, text: Path) -> None:
    found = measured(before, str(text), "perplexity", window=32)
    assert found["perplexity.word"].value is None
    assert "lm-eval" in str(found["perplexity.bits_per_byte"].reason)


def test_fidelity_against_double_precision(before: Path, text: Path, tmp_path: Path) -> None:
    other = quantized_models.add_tokenizer(models_zoo.write("llama", tmp_path, seed=1), models_zoo.VOCABULARY)
    joined = "\n\n".join(documents(str(text)).texts)
    tokens = AutoTokenizer.from_pretrained(before)(joined, add_special_tokens=False)["input_ids"]
    windows = [tokens[start : start + 32] for start in range(0, len(tokens) - 31, 32)]
    divergences, same, changes, losses = [], [], [], []
    for window, old, new in zip(windows, logits_of(before, windows), logits_of(other, windows), strict=True):
        p, q = old[:-1].log_softmax(-1), new[:-1].log_softmax(-1)
        divergences.append(torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
        targets = torch.tensor(window[1:])[:, None]
        changes.append(q.exp().gather(1, targets) - p.exp().gather(1, targets))
        losses.append((p.gather(1, targets) - q.gather(1, targets)).mean())
    everything, change = torch.cat(divergences), torch.cat(changes)
    found = measured(other, str(text), "fidelity", reference=before, window=32)
    assert found["fidelity.kl"].value == pytest.approx(float(everything.mean()), rel=1e-5)
    assert found["fidelity.kl_largest"].value == pytest.approx(float(everything.max()), rel=1e-5)
    assert found["fidelity.top1"].value == pytest.approx(float(torch.cat(same).double().mean()))
    assert found["fidelity.kl"].samples == pytest.approx(
        [float(each.mean()) for each in divergences], rel=1e-4
    )
    assert found["fidelity.kl"].conditions["divergence"] == "exact"
    for name, share in (("median", 50.0), ("p90", 90.0), ("p95", 95.0), ("p99", 99.0)):
        expected = float(np.percentile(everything.numpy(), share))
        assert found[f"fidelity.kl_{name}"].value == pytest.approx(expected, rel=1e-5)
    assert "too few for a 99.9th percentile" in str(found["fidelity.kl_p99_9"].reason)
    assert found["fidelity.delta_p"].value == pytest.approx(float(change.mean()), rel=1e-4, abs=1e-8)
    assert found["fidelity.delta_p_rms"].value == pytest.approx(
        float(change.square().mean().sqrt()), rel=1e-4
    )
    assert found["fidelity.log_ppl_ratio"].samples == pytest.approx([float(x) for x in losses], abs=1e-6)
    ratio = [
        measured(each, str(text), "perplexity", window=32)["perplexity"].value for each in (other, before)
    ]
    assert found["fidelity.log_ppl_ratio"].value == pytest.approx(
        math.log(float(ratio[0] or 0) / float(ratio[1] or 1)), abs=1e-6
    )
    few = measured(other, str(text), "fidelity", reference=before, window=32, tokens=64)
    assert few["fidelity.kl_p99"].value is None


def test_a_model_agrees_with_itself(before: Path, text: Path) -> None:
    found = measured(before, str(text), "fidelity", reference=before, window=32)
    assert found["fidelity.kl"].value == 0.0
    assert found["fidelity.top1"].value == 1.0
    assert found["fidelity.delta_p_rms"].value == 0.0
    assert found["fidelity.log_ppl_ratio"].value == 0.0
    alone = measured(before, str(text), "fidelity", window=32)
    assert alone["fidelity.kl"].reason == "this arm is the reference"


def test_a_model_that_computes_nan_has_no_perplexity(before: Path, text: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(before)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    model.save_pretrained(tmp_path / "nan")
    quantized_models.add_tokenizer(tmp_path / "nan", models_zoo.VOCABULARY)
    found = measured(tmp_path / "nan", str(text), "perplexity", window=32)["perplexity"]
    assert found.value is None
    assert found.reason is not None
    assert "NaN" in found.reason


def labelled(folder: Path) -> str:
    file = folder / "labelled.jsonl"
    words = ["good", "bad thing", "fine day", "poor show", "a"]
    file.write_text("\n".join(json.dumps({"text": w, "label": n % 2}) for n, w in enumerate(words)))
    return str(file)


def test_classifiers(tmp_path: Path) -> None:
    import transformers

    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = transformers.BertForSequenceClassification(models_zoo.configuration("bert"))
        model.save_pretrained(tmp_path / str(seed))
        folders.append(quantized_models.add_tokenizer(tmp_path / str(seed), models_zoo.VOCABULARY))
    lines = labelled(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    logits = []
    for folder in folders:
        model = transformers.BertForSequenceClassification.from_pretrained(folder, dtype=torch.float64)
        with torch.no_grad():
            logits.append(
                torch.cat(
                    [
                        model(torch.tensor([tokenizer(each)["input_ids"]])).logits
                        for each in documents(lines).texts
                    ]
                )
            )
    accuracy = measured(folders[1], lines, "accuracy")["accuracy"]
    right = logits[1].argmax(-1) == torch.tensor([0, 1, 0, 1, 0])
    assert accuracy.samples == tuple(right.double().tolist())
    found = measured(folders[1], lines, "fidelity", reference=folders[0])
    expected = torch.nn.functional.kl_div(
        logits[1].log_softmax(-1), logits[0].log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    assert found["fidelity.kl"].samples == pytest.approx(expected.tolist(), abs=1e-6)
    assert set(found) == {"fidelity.kl", "fidelity.top1"}


def test_encoders(tmp_path: Path) -> None:
    folders = [
        quantized_models.add_tokenizer(
            models_zoo.write("bert", tmp_path / str(seed), seed=seed), models_zoo.VOCABULARY
        )
        for seed in (0, 1)
    ]
    lines = labelled(tmp_path)
    found = measured(folders[1], lines, "fidelity", reference=folders[0])
    assert set(found) == {"fidelity.cosine"}
    cosine = found["fidelity.cosine"]
    assert len(cosine.samples) == 5
    assert cosine.value is not None
    assert -1 < cosine.value < 1
    itself = measured(folders[0], lines, "fidelity", reference=folders[0])["fidelity.cosine"]
    assert itself.value == pytest.approx(1.0)


@pytest.mark.slow
def test_gutenberg_s_reference(shared: Path) -> None:
    """3.7175 nats a token on the first 40,960 tokens, disjoint windows of 256."""
    found = measured(
        shared / "models/gutenberg-4m",
        str(shared / "data/gutenberg_valid.txt.gz"),
        "perplexity",
        window=256,
        tokens=40_960,
        join="\n<|endoftext|>\n",
    )["perplexity"]
    assert found.conditions["protocol"]["targets"] == 160 * 255
    assert found.value is not None
    assert math.log(found.value) == pytest.approx(3.7175, abs=5e-4)


@pytest.mark.slow
def test_stories_reference(shared: Path) -> None:
    """1.54422 nats a token over all 79,532 targets, each story as BOS and tokens, cut at 512."""
    found = measured(
        shared / "models/stories260K",
        str(shared / "data/tinystories_sample.txt"),
        "perplexity",
        protocol="documents",
        window=512,
        tokens=1_000_000,
    )["perplexity"]
    assert found.conditions["protocol"]["targets"] == 79_532
    assert found.value is not None
    assert math.log(found.value) == pytest.approx(1.54422, abs=2e-5)


def test_stories_second_halves(shared: Path) -> None:
    """Its tokenizer puts the beginning-of-text token first by itself, so every window starts with it."""
    folder, source = shared / "models/stories260K", str(shared / "data/tinystories_sample.txt")
    tokens = AutoTokenizer.from_pretrained(folder)("\n\n".join(documents(source).texts))["input_ids"][:4096]
    assert tokens[0] == 1
    windows = [[1, *tokens[start + 1 : start + 512]] for start in range(0, 4096, 512)]
    losses = [
        torch.nn.functional.cross_entropy(logits[256:511], torch.tensor(window[257:]))
        for window, logits in zip(windows, logits_of(folder, windows), strict=True)
    ]
    found = measured(folder, source, "perplexity", protocol="llama.cpp", tokens=4096)["perplexity"]
    assert found.conditions["protocol"]["targets"] == 8 * 255
    assert found.value is not None
    assert math.log(found.value) == pytest.approx(float(torch.stack(losses).mean()), abs=1e-6)
