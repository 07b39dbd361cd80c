"""The shipped recipes: they fit their methods, say how they are used, and judge what they make."""

from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from compress import engine
from compress.core.artifact import Artifact
from compress.core.recipe import Recipe, schema
from tests import models_zoo, quantized_models

FOLDER = Path(__file__).resolve().parents[2] / "recipes"


def stages(recipe: Recipe) -> list[str]:
    """The folders of the artifacts that a recipe makes, which are the names of the arms of its bench."""
    return [f"{number:02d}-{step.use}" for number, step in enumerate(recipe.steps, 1)]


@pytest.fixture(params=sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_it_fits_its_methods_and_has_gates(path: Path) -> None:
    recipe = Recipe.load(path, settings=["model=some/model", "data.eval=some.txt"])
    assert recipe.bench is not None
    assert recipe.gates
    assert Recipe.from_yaml(recipe.dump()).dump() == recipe.dump()


def test_it_is_valid_by_the_schema(path: Path) -> None:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema()).validate({"model": "some/model", **document})


def test_it_says_how_it_is_used(path: Path) -> None:
    assert f"compress run recipes/{path.name} --model MODEL" in path.read_text(encoding="utf-8")


def test_a_gate_speaks_of_a_stage_that_there_is(path: Path) -> None:
    recipe = Recipe.load(path, settings=["model=some/model", "data.eval=some.txt"])
    known = {*stages(recipe), "before", "after"}
    for gate in recipe.gates:
        named = (gate.arms.before, gate.arms.after, gate.arms.damaged)
        assert {name.partition("@")[0] for name in named if name is not None} <= known


CHAINS = {"minitron": (1, 3), "full-chain": (1,)}
"""Recipes of several stages for real models, and which of their steps train."""
TRAINING = {"tokens": 256, "window": 16, "batch": 2, "accumulation": 2, "evaluation_tokens": 64}
BENCH = {
    "launches": 2,
    "looks": 1,
    "budget": 0,
    "noise_floor": "false",
    "launch_seconds": 0,
    "repeats": 1,
    "sample_seconds": 0,
    "tokens": 160,
    "window": 16,
    "prompt_length": 8,
    "new_tokens": 2,
    "resamples": 100,
}
"""Figures that say nothing, as soon as can be."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random decoder and its texts, over one vocabulary of characters."""
    folder = tmp_path_factory.mktemp("place")
    source = models_zoo.write("llama-tied", folder, dtype=torch.bfloat16)
    quantized_models.add_tokenizer(source, models_zoo.VOCABULARY)
    for name, seed in (("train", 5), ("eval", 6)):
        characters = models_zoo.tokens(1, 4000, seed=seed)[0].tolist()
        text = "".join(chr(29 + number) for number in characters).replace(" ", "x")
        (folder / f"{name}.txt").write_text(text)
    return folder


def small(name: str, place: Path, *settings: str) -> Recipe:
    """A chain on the random model, with a few tokens."""
    texts = {"calibration": "train", "train": "train", "eval": "eval"}
    said = [f"model={place / 'llama-tied'}", "device=cpu", "threads=1", "data.samples=8"]
    said += ["data.sequence_length=16", *(f"data.{use}={place / text}.txt" for use, text in texts.items())]
    for step in CHAINS[name]:
        said += [f"steps.{step}.{option}={value}" for option, value in TRAINING.items()]
    return Recipe.load(FOLDER / f"{name}.yaml", settings=[*said, *settings])


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_has_a_gate_for_each_of_its_stages(name: str, place: Path) -> None:
    recipe = small(name, place)
    judged = {(gate.arms.after or "").partition("@")[0] for gate in recipe.gates}
    assert judged == set(stages(recipe))


def test_a_model_is_pruned_in_steps(place: Path, tmp_path: Path) -> None:
    recipe = small("minitron", place, "bench=null", "gates=[]")
    result = engine.run(recipe, tmp_path / "out")
    assert [folder.name for folder in result.artifacts] == stages(recipe)
    model = AutoModelForCausalLM.from_pretrained(result.final)
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (2, 48)
    lineage = Artifact.open(result.final).lineage
    assert lineage is not None
    # The original teaches both times.
    assert len({step.options["teacher"] for step in lineage.steps if step.use == "distill.logits"}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_judges_each_of_its_stages(name: str, place: Path, tmp_path: Path) -> None:
    recipe = small(name, place, *(f"bench.{option}={value}" for option, value in BENCH.items()))
    result = engine.run(recipe, tmp_path / "out")
    assert [folder.name for folder in result.artifacts] == stages(recipe)
    arms = {arm.model for arm in result.results.arms if arm.measurements["perplexity"].value is not None}
    assert arms == {"before", *stages(recipe)}
    judged = {judgement.after.partition("@")[0] for judgement in result.results.judgements}
    assert judged == set(stages(recipe))
    report = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert all(stage in report for stage in stages(recipe))
