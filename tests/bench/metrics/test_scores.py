"""Perplexity, divergence, accuracy and cosine against direct computations in double precision."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.bench.material import prepare
from compress.bench.metrics import Subject, find
from compress.bench.options import Options
from compress.core.artifact import Artifact
from compress.core.measurement import Measurement
from compress.data.corpora import documents
from compress.models.tasks import resolve
from compress.runtimes import Placement
from compress.runtimes import find as find_runtime
from tests import models_zoo, quantized_models


def measured(
    folder: Path, text: str, metric: str, *, reference: Path | None = None, task: str = "auto", **options: Any
) -> dict[str, Measurement]:
    settings = Options(**options)
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


def test_divergence_and_agreement(before: Path, text: Path, tmp_path: Path) -> None:
    other = quantized_models.add_tokenizer(models_zoo.write("llama", tmp_path, seed=1), models_zoo.VOCABULARY)
    joined = "\n\n".join(documents(str(text)).texts)
    tokens = AutoTokenizer.from_pretrained(before)(joined, add_special_tokens=False)["input_ids"]
    windows = [tokens[start : start + 32] for start in range(0, len(tokens) - 31, 32)]
    divergences, same = [], []
    for old, new in zip(logits_of(before, windows), logits_of(other, windows), strict=True):
        p, q = old.log_softmax(-1), new.log_softmax(-1)
        divergences.append(torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1))
        same.append(old.argmax(-1) == new.argmax(-1))
    everything = torch.cat(divergences)
    found = measured(other, str(text), "fidelity", reference=before, window=32)
    assert found["fidelity.kl"].value == pytest.approx(float(everything.mean()), rel=1e-4)
    assert found["fidelity.kl_largest"].value == pytest.approx(float(everything.max()), rel=1e-4)
    assert found["fidelity.top1"].value == pytest.approx(float(torch.cat(same).double().mean()))
    assert found["fidelity.kl"].samples == pytest.approx(
        [float(each.mean()) for each in divergences], rel=1e-3
    )
    # A percentile is one of the values, above 99 of 100.
    assert float((everything <= found["fidelity.kl_p99"].value + 1e-6).double().mean()) >= 0.989
    few = measured(other, str(text), "fidelity", reference=before, window=32, tokens=64)
    assert few["fidelity.kl_p99"].value is None


def test_a_model_agrees_with_itself(before: Path, text: Path) -> None:
    found = measured(before, str(text), "fidelity", reference=before, window=32)
    assert found["fidelity.kl"].value == 0.0
    assert found["fidelity.top1"].value == 1.0
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
