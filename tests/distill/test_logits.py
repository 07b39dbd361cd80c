"""Distillation through the engine and the command line: what it needs, what it refuses, what comes out."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress import engine
from compress.cli import app
from compress.core.artifact import RUN_FILE, TRAINING_FILE, Artifact, Lineage
from compress.core.errors import CompressError, DataError, ModelError, PlanError
from compress.core.recipe import Recipe
from tests import models_zoo, quantized_models, teacher_and_student
from tests.dummies import Nudge, Recorder, register
from tests.marks import slow_but
from tests.teacher_and_student import recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student of another size and its text, all over one vocabulary of characters."""
    return teacher_and_student.write(tmp_path_factory.mktemp("place"))


def lineage_of(folder: Path) -> Lineage:
    lineage = Lineage.read(folder)
    assert lineage is not None
    return lineage


def test_a_student_comes_nearer_to_its_teacher(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert engine.run(recipe(place, tokens="4_096"), out, single=True).final == out
    decisions = lineage_of(out).steps[0].decisions
    found = decisions["validation"]
    assert found["best"]["divergence"] < 0.7 * found["before"]["divergence"]
    assert decisions["steps"] == 64
    assert decisions["tokens"] == 4_096
    assert decisions["precision"] == "float32"
    with (out / TRAINING_FILE).open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 65
    assert float(rows[0]["validation_divergence"]) == found["before"]["divergence"]
    # Held-out text read again, by the result as its users load it.
    model, teacher = (AutoModelForCausalLM.from_pretrained(path) for path in (out, place / "teacher"))
    tokens = models_zoo.tokens(4, 16, seed=9)
    with torch.no_grad():
        distances = [
            torch.nn.functional.kl_div(
                each(tokens).logits.log_softmax(-1), teacher(tokens).logits.softmax(-1), reduction="sum"
            )
            for each in (model, AutoModelForCausalLM.from_pretrained(place / "student"))
        ]
    assert distances[0] < 0.8 * distances[1]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_folder_is_the_students_but_for_the_weights(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    engine.run(recipe(place), out, single=True)
    for file in (place / "student").iterdir():
        if file.suffix != ".safetensors":
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    ours = {"compress.json", RUN_FILE, TRAINING_FILE}
    assert {path.name for path in out.iterdir()} == {
        path.name for path in (place / "student").iterdir()
    } | ours
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    report = engine.verify(out)
    assert report.weights is not None
    assert report.weights.changed > 0
    # The table belongs to this step and does not travel into the next artifact.
    assert TRAINING_FILE not in {path.name for path in Artifact.open(out).companions}


def test_the_same_inputs_give_the_same_bytes_wherever_they_lie(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "teacher", tmp_path / "teacher elsewhere")
    elsewhere = recipe(place, tokens=320, teacher=str(tmp_path / "teacher elsewhere"))
    engine.run(recipe(place, tokens=320), tmp_path / "one", single=True)
    engine.run(elsewhere, tmp_path / "two", single=True)
    for file in (tmp_path / "one").iterdir():
        if file.name != RUN_FILE:
            assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
    said = json.loads((tmp_path / "two" / RUN_FILE).read_text())
    assert said["teacher"] == str(tmp_path / "teacher elsewhere")
    digest = Artifact.open(place / "teacher").digest
    assert lineage_of(tmp_path / "one").steps[0].options["teacher"] == f"sha256:{digest}"
    again = engine.run(recipe(place, tokens=320), tmp_path / "one", single=True)
    assert again.did_nothing


def test_the_key_changes_with_teacher_text_and_numbers(place: Path, tmp_path: Path) -> None:
    def key(made: Recipe) -> str | None:
        return engine.plan(made, tmp_path / "out", single=True).steps[0].key

    shutil.copytree(place / "teacher", tmp_path / "teacher")
    weights = load_file(tmp_path / "teacher" / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "text.txt").write_text((place / "text.txt").read_text() + "!")
    train = str(place / "text.txt")
    keys = [
        key(recipe(place)),
        key(recipe(place, teacher=str(tmp_path / "teacher"))),
        key(recipe(place, data={"train": str(tmp_path / "text.txt")})),
        key(recipe(place, data={"train": train, "validation": str(tmp_path / "text.txt")})),
        key(recipe(place, temperature=2.0)),
        key(recipe(place, loss="jensen_shannon")),
        key(recipe(place, loss="jensen_shannon", beta=0.1)),
        key(recipe(place, precision="bfloat16")),
        key(recipe(place).with_settings(["seed=1"])),
    ]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert key(recipe(place, precision="float32")) == keys[0]


def test_a_recipe_teaches_what_it_changed_by_what_it_started_from(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, "transform.nudge", Nudge)
    text = f"""
model: {place / "student"}
threads: 1
device: cpu
data: {{train: {place / "text.txt"}}}
steps:
  - use: transform.nudge
  - use: distill.logits
    teacher: $model
    tokens: 2_048
    window: 16
    batch: 4
    learning_rate: 1e-2
    precision: float32
"""
    result = engine.run(Recipe.from_yaml(text), tmp_path / "out")
    steps = lineage_of(result.final).steps
    assert [step.use for step in steps] == ["transform.nudge", "distill.logits"]
    assert steps[1].decisions["teacher"] == Artifact.open(place / "student").digest
    found = steps[1].decisions["validation"]
    assert found["best"]["divergence"] < 0.8 * found["before"]["divergence"]
    assert engine.run(Recipe.from_yaml(text), tmp_path / "out").did_nothing


def test_the_command_line_distils(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["distill", "logits", str(place / "student"), "--teacher", str(place / "teacher")]
    words += ["--train", str(place / "text.txt"), "--out", str(tmp_path / "out"), "--threads", "1"]
    words += [
        "--tokens",
        "1_280",
        "--window",
        "16",
        "--batch",
        "4",
        "--device",
        "cpu",
        "--learning-rate",
        "1e-3",
    ]
    assert app.main([*words, "--plan"]) == 0
    assert "distill.logits" in capsys.readouterr().out
    assert app.main(words) == 0, capsys.readouterr().err
    said = capsys.readouterr().err
    assert "training: 1280 tokens" in said
    assert "text.txt: 20 windows of 16 tokens" in said or "windows of 16 tokens" in said
    assert lineage_of(tmp_path / "out").steps[0].decisions["steps"] == 20
    assert app.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["did_nothing"] is True


def test_training_flags_are_for_methods_that_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["quantize", "rtn", "m", "--out", "o", "--train", "t"]) == 2
    assert "unknown flag '--train'" in capsys.readouterr().err
    words = "distill logits m --out o --train t.txt --validation v.txt --print-recipe"
    assert app.main(words.split()) == 0
    printed = Recipe.from_yaml(capsys.readouterr().out)
    assert (printed.data.train, printed.data.validation) == ("t.txt", "v.txt")


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_quantized_artifact_can_teach(place: Path, tmp_path: Path, bits: int) -> None:
    quantized = engine.run(
        Recipe.of(
            {
                "model": str(place / "teacher"),
                "threads": 1,
                "device": "cpu",
                "steps": [{"use": "quantize.rtn", "bits": bits, "group_size": 16}],
            }
        ),
        tmp_path / "teacher",
        single=True,
    )
    engine.run(recipe(place, teacher=str(quantized.final), tokens=1_920), tmp_path / "out", single=True)
    found = lineage_of(tmp_path / "out").steps[0].decisions["validation"]
    assert found["best"]["divergence"] < found["before"]["divergence"]


def refused(made: Recipe, out: Path) -> CompressError:
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(CompressError) as caught:
        engine.plan(made, out, single=len(made.steps) == 1)
    assert sorted(out.parent.rglob("*")) == before
    return caught.value


def test_without_text_the_plan_is_refused(place: Path, tmp_path: Path) -> None:
    found = refused(recipe(place, data={}), tmp_path / "out")
    assert isinstance(found, PlanError)
    assert "step 0 (distill.logits) needs training text" in found.message
    assert "--train" in found.hint
    found = refused(recipe(place, data={"train": str(place / "absent.txt")}), tmp_path / "out")
    assert isinstance(found, DataError)
    found = refused(recipe(place, data={"validation": str(place / "text.txt")}), tmp_path / "out")
    assert isinstance(found, PlanError)


def test_a_step_far_down_is_refused_at_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, "transform.nudge", Nudge)
    later = recipe(place, data={})
    made = Recipe.of(
        {"model": str(place / "student"), "steps": [{"use": "transform.nudge"}, later.steps[0].document()]}
    )
    assert "step 1 (distill.logits) needs training text" in refused(made, tmp_path / "out").message
    absent = recipe(place, teacher=str(place / "absent"))
    made = Recipe.of(
        {
            **made.model_dump(mode="json", exclude={"steps"}),
            "data": {"train": str(place / "text.txt")},
            "steps": [{"use": "transform.nudge"}, absent.steps[0].document()],
        }
    )
    assert isinstance(refused(made, tmp_path / "out"), ModelError)


def test_a_teacher_that_is_not_there_is_refused(place: Path, tmp_path: Path) -> None:
    found = refused(recipe(place, teacher=str(place / "teachr")), tmp_path / "out")
    assert isinstance(found, ModelError)
    assert "teacher" in found.hint


def test_a_model_cannot_teach_itself(place: Path, tmp_path: Path) -> None:
    found = refused(recipe(place, teacher="$model"), tmp_path / "out")
    assert "the same model" in found.message
    engine.plan(
        recipe(place, teacher="$model", loss="forward_kl,cross_entropy=0.5"), tmp_path / "out", single=True
    )


def test_another_vocabulary_is_refused(place: Path, tmp_path: Path) -> None:
    config = models_zoo.configuration("llama")
    config.vocab_size = 128
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "larger")
    found = refused(recipe(place, teacher=str(tmp_path / "larger")), tmp_path / "out")
    assert isinstance(found, PlanError)
    assert "has 96 tokens" in found.message
    assert "has 128" in found.message
    shutil.copytree(place / "teacher", tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    words = json.loads(file.read_text())
    known = words["model"]["vocab"]
    known["B"], known["C"] = known["C"], known["B"]
    file.write_text(json.dumps(words))
    found = refused(recipe(place, teacher=str(tmp_path / "other")), tmp_path / "out")
    assert isinstance(found, PlanError)
    assert "the tokenizers differ: 'B' is token 37" in found.message
    assert "38 of teacher" in found.message


def test_models_that_do_not_write_text_are_refused(place: Path, tmp_path: Path) -> None:
    encoder = models_zoo.write("bert", tmp_path)
    quantized_models.add_tokenizer(encoder, models_zoo.VOCABULARY)
    found = refused(recipe(place, teacher=str(encoder)), tmp_path / "out")
    assert "no causal language model" in found.message
    made = recipe(place).with_settings([f"model={encoder}"])
    assert "trains a causal language model" in refused(made, tmp_path / "out").message


def test_windows_longer_than_the_model_are_refused(place: Path, tmp_path: Path) -> None:
    found = refused(recipe(place, window=128, batch=1), tmp_path / "out")
    assert "longer than the 64 positions" in found.message
    assert "--window 64" in found.hint


def test_a_budget_for_no_step_is_refused(place: Path, tmp_path: Path) -> None:
    assert "does not pay for one step" in refused(recipe(place, tokens=10), tmp_path / "out").message


def test_the_plan_predicts_more_for_more(place: Path, tmp_path: Path) -> None:
    def needs(**options: Any) -> Any:
        return engine.plan(recipe(place, **options), tmp_path / "out", single=True).steps[0].needs

    base, more = needs(), needs(tokens=12_800, batch=8)
    weights = (place / "student" / "model.safetensors").stat().st_size
    assert base.disk_bytes > weights
    assert more.host_bytes > base.host_bytes
    assert base.device_bytes == 0


def test_a_student_that_gets_no_better_stays_as_it_was(place: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    # A rate at which a step in bfloat16 weights does nothing but harm.
    harm = recipe(place, learning_rate=50.0, warmup=0.0, tokens=128, evaluate_every=2, clip=0)
    engine.run(harm, tmp_path / "out", single=True, reporter=recorder)
    assert any("no step made the validation loss smaller" in message for message in recorder.messages)
    lineage = lineage_of(tmp_path / "out")
    assert not any(meant.changed for meant in lineage.tensors.values())
    assert lineage.steps[0].decisions["kept_step"] == 0
    before, after = (load_file(path / "model.safetensors") for path in (place / "student", tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("reverse_kl", {"reverse_kl": 1.0}),
        ("forward_kl=0.7, cross_entropy=0.3", {"forward_kl": 0.7, "cross_entropy": 0.3}),
        ({"total_variation": 2}, {"total_variation": 2.0}),
    ],
)
def test_a_loss_is_spelled_as_text_or_as_a_mapping(given: Any, meant: dict[str, float], place: Path) -> None:
    made = recipe(place, loss=given)
    assert made.steps[0].built().model_dump()["loss"] == meant
    assert Recipe.from_yaml(made.dump()).steps[0].built() == made.steps[0].built()


@pytest.mark.parametrize(
    ("loss", "complaint"),
    [
        ("forward_kl=0", "the weight of forward_kl must be a number above 0"),
        ("forward_kl=-1,cross_entropy=1", "above 0"),
        ("forward=1", "Input should be 'forward_kl'"),
        ("forward_kl=much", "valid number"),
        ({}, "at least 1"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss: Any, complaint: str, place: Path) -> None:
    with pytest.raises(CompressError, match=complaint):
        recipe(place, loss=loss)


@pytest.mark.parametrize(
    "name", slow_but(("reverse_kl",), ("reverse_kl", "jensen_shannon", "total_variation"))
)
def test_every_divergence_is_learned_and_told(name: str, place: Path, tmp_path: Path) -> None:
    made = recipe(place, loss={name: 1.0, "cross_entropy": 0.01}, tokens=4_096)
    engine.run(made, tmp_path / "out", single=True)
    found = lineage_of(tmp_path / "out").steps[0].decisions["validation"]
    assert set(found["last"]) == {"loss", "divergence", "cross_entropy", name}
    assert found["best"]["loss"] < 0.9 * found["before"]["loss"]
    assert found["best"]["divergence"] < 0.9 * found["before"]["divergence"]


def test_documents_are_kept_apart_and_blocks_computed_again(place: Path, tmp_path: Path) -> None:
    text = (place / "text.txt").read_text()
    file = tmp_path / "documents.txt"
    file.write_text("<|endoftext|>".join(text[at : at + 9] for at in range(0, len(text), 9)))
    losses = {}
    for name, options in {
        "joined": {},
        "apart": {"documents": "apart"},
        "again": {"documents": "apart", "activations": "recompute"},
    }.items():
        made = recipe(place, data={"train": str(file)}, tokens=512, **options)
        engine.run(made, tmp_path / name, single=True)
        losses[name] = (tmp_path / name / TRAINING_FILE).read_bytes()
    assert losses["joined"] != losses["apart"]
    assert losses["again"] == losses["apart"], "the same, computed twice"
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "apart" / name).read_bytes()


def test_patience_is_told_and_the_best_is_kept(place: Path, tmp_path: Path) -> None:
    harm = recipe(place, learning_rate=50.0, warmup=0.0, evaluate_every=1, clip=0, patience=2)
    recorder = Recorder()
    engine.run(harm, tmp_path / "out", single=True, reporter=recorder)
    assert any("stopped after step 2 of 20" in message for message in recorder.messages)
    assert lineage_of(tmp_path / "out").steps[0].decisions["tokens"] == 2 * 64
