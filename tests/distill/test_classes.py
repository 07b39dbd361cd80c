"""Distillation of classifiers through the engine: labelled and unlabelled text, refusals, results."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from compress import engine
from compress.core.artifact import RUN_FILE, TRAINING_FILE, Artifact, Lineage
from compress.core.errors import CompressError, DataError, PlanError
from compress.core.recipe import Recipe
from tests import models_zoo, quantized_models

NAMES = {0: "few", 1: "many"}


def classifier(folder: Path, name: str, *, layers: int, seed: int, **options: Any) -> Path:
    """A classifier of the texts of `text`: random, or one whose bias and body make it say something."""
    config = models_zoo.configuration(options.pop("family", "bert"))
    config.num_hidden_layers, config.pad_token_id = layers, 0
    config.id2label = options.pop("names", NAMES)
    config.label2id = {word: number for number, word in config.id2label.items()}
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    model.save_pretrained(folder / name)
    quantized_models.add_tokenizer(folder / name, models_zoo.VOCABULARY)
    return folder / name


def text(file: Path, count: int, *, labelled: int) -> Path:
    """Documents of different lengths and of two alphabets, the first of them with a label."""
    generator = torch.Generator().manual_seed(7)
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            length, kind = (
                int(torch.randint(*span, (1,), generator=generator)) for span in ((2, 14), (0, 2))
            )
            low = 33 + 43 * kind
            characters = torch.randint(low, low + 43, (length,), generator=generator).tolist()
            record = {"text": "".join(map(chr, characters))}
            if number < labelled:
                record["label"] = NAMES[kind]
            stream.write(json.dumps(record) + "\n")
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    classifier(folder, "teacher", layers=3, seed=1)
    classifier(folder, "student", layers=2, seed=2)
    text(folder / "mixed.jsonl", 200, labelled=60)
    text(folder / "bare.jsonl", 100, labelled=0)
    text(folder / "labelled.jsonl", 200, labelled=200)
    return folder


def recipe(place: Path, **options: Any) -> Recipe:
    step = {
        "use": "distill.classes",
        "teacher": str(place / "teacher"),
        "tokens": 24 * 8 * 16,
        "window": 16,
        "batch": 8,
        "learning_rate": 3e-3,
        "evaluation_tokens": 16 * 20,
        "precision": "float32",
        **options,
    }
    train = step.pop("train", place / "mixed.jsonl")
    return Recipe.of(
        {
            "model": str(step.pop("model", place / "student")),
            "threads": 1,
            "device": "cpu",
            "data": {"train": str(train)},
            "steps": [step],
        }
    )


def lineage_of(folder: Path) -> Lineage:
    lineage = Lineage.read(folder)
    assert lineage is not None
    return lineage


def test_a_student_learns_what_its_teacher_says(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert engine.run(recipe(place), out, single=True).final == out
    decisions = lineage_of(out).steps[0].decisions
    found = decisions["validation"]
    assert found["best"]["divergence"] < 0.7 * found["before"]["divergence"]
    assert decisions["teacher"] == Artifact.open(place / "teacher").digest
    with (out / TRAINING_FILE).open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert len(table) == 25
    assert 0 <= float(table[-1]["validation_accuracy"]) <= 1
    assert float(table[-1]["loss"]) == float(table[-1]["divergence"])
    # Read again as its users load it, on texts padded on the right.
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    tokenizer.pad_token = "<unk>"
    words = [json.loads(line)["text"] for line in (place / "mixed.jsonl").read_text().splitlines()[:64]]
    batch = tokenizer(words, return_tensors="pt", padding=True, return_token_type_ids=False)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    with torch.no_grad():
        said = [
            load(path)(**batch).logits.log_softmax(-1) for path in (out, place / "student", place / "teacher")
        ]
    distances = [
        torch.nn.functional.kl_div(each, said[2], log_target=True, reduction="batchmean") for each in said[:2]
    ]
    assert distances[0] < 0.7 * distances[1]


def test_labels_count_where_they_are_asked_for(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = recipe(place, cross_entropy=1.0, teacher="$model", train=place / "labelled.jsonl")
    engine.run(made, out, single=True)
    found = lineage_of(out).steps[0].decisions["validation"]
    assert found["best"]["cross_entropy"] < found["before"]["cross_entropy"]
    assert found["best"]["loss"] == found["best"]["cross_entropy"]
    assert found["best"]["accuracy"] > 0.8


def test_text_without_labels_is_enough(place: Path, tmp_path: Path) -> None:
    engine.run(recipe(place, train=place / "bare.jsonl"), tmp_path / "out", single=True)
    found = lineage_of(tmp_path / "out").steps[0].decisions["validation"]
    assert found["best"]["divergence"] < found["before"]["divergence"]


def test_the_same_inputs_give_the_same_bytes_and_the_folder_is_the_students(
    place: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        engine.run(recipe(place, tokens=512), tmp_path / name, single=True)
    for file in (tmp_path / "one").iterdir():
        if file.name != RUN_FILE:
            assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
    assert load_file(tmp_path / "one" / "model.safetensors").keys() == (
        load_file(place / "student" / "model.safetensors").keys()
    )
    report = engine.verify(tmp_path / "one")
    assert report.weights is not None


def test_a_decoder_that_chooses_classes_is_padded_on_the_right(place: Path, tmp_path: Path) -> None:
    for name, layers, seed in (("teacher", 2, 3), ("student", 1, 4)):
        classifier(tmp_path, name, layers=layers, seed=seed, family="llama")
    made = recipe(place, model=tmp_path / "student", teacher=str(tmp_path / "teacher"))
    engine.run(made, tmp_path / "out", single=True)
    found = lineage_of(tmp_path / "out").steps[0].decisions["validation"]
    assert found["best"]["divergence"] < found["before"]["divergence"]


def refused(made: Recipe, out: Path) -> CompressError:
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(CompressError) as caught:
        engine.plan(made, out, single=True)
    assert sorted(out.parent.rglob("*")) == before
    return caught.value


def test_what_cannot_be_learned_is_refused(place: Path, tmp_path: Path) -> None:
    found = refused(recipe(place, teacher="$model"), tmp_path / "out")
    assert "nothing to learn" in found.message
    other = classifier(tmp_path, "other", layers=2, seed=3, names={0: "few", 1: "many", 2: "none"})
    found = refused(recipe(place, teacher=str(other)), tmp_path / "out")
    assert isinstance(found, PlanError)
    assert "has 2 (few, many)" in found.message
    assert "3 (few, many, none)" in found.message
    encoder = quantized_models.add_tokenizer(models_zoo.write("bert", tmp_path), models_zoo.VOCABULARY)
    found = refused(recipe(place, teacher=str(encoder)), tmp_path / "out")
    assert "no sequence classifier" in found.message
    found = refused(recipe(place, model=encoder), tmp_path / "out")
    assert "distill.classes trains a sequence classifier" in found.message
    decoder = classifier(tmp_path, "decoder", layers=1, seed=3, family="llama")
    config = json.loads((decoder / "config.json").read_text())
    config["pad_token_id"] = None
    (decoder / "config.json").write_text(json.dumps(config))
    found = refused(recipe(place, model=decoder), tmp_path / "out")
    assert "no token for padding" in found.message


def test_a_label_that_no_class_has_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ab", "label": "most"}\n{"text": "cd", "label": "few"}\n')
    with pytest.raises(DataError, match="no label of the model"):
        engine.run(recipe(place, train=tmp_path / "a.jsonl"), tmp_path / "out", single=True)
