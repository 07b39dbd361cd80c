"""What every registered method keeps to, whoever wrote it; nothing here names one.

A method that is added, in this package or in another that is installed, is covered by being there.
"""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from compress.cli import app
from compress.cli.docs import method_page, own_names
from compress.cli.flags import entry_type, is_model, spelling
from compress.core.errors import CompressError, PlanError
from compress.core.facts import Fact
from compress.core.passes import FAMILIES, Pass, find, name_of, names
from compress.core.recipe import Recipe, Step, schema

HEAVY = ("torch", "transformers", "datasets", "scipy", "numpy", "pandas")
RUN_FLAGS = {"--out", "--calibration", "--samples", "--seed", "--device", "--threads", "--plan", "--json"}


@pytest.fixture(params=names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def method(name: str) -> type[Pass]:
    return find(name)


def described(model: type[BaseModel]) -> list[str]:
    """Fields without a description, also of the models that fields hold."""
    missing = []
    for field_name, field in model.model_fields.items():
        if not field.description:
            missing.append(f"{model.__name__}.{field_name}")
        entry: Any = entry_type(field.annotation) or field.annotation
        if is_model(entry):
            missing += described(entry)
    return missing


def command_of(name: str) -> tuple[TyperCommand, Any]:
    """The command of a method, and the context in which its help page is written."""
    family, _, short = name.partition(".")
    root = get_command(app.app)
    assert isinstance(root, TyperGroup)
    outer = root.make_context("compress", [], resilient_parsing=True)
    group = root.get_command(outer, family)
    assert isinstance(group, TyperGroup)
    inner = group.make_context(family, [], outer, resilient_parsing=True)
    command = group.get_command(inner, short)
    assert isinstance(command, TyperCommand)
    return command, command.make_context(short, [], inner, resilient_parsing=True)


def test_the_name_is_a_family_and_a_method(name: str, method: type[Pass]) -> None:
    assert name.partition(".")[0] in FAMILIES
    assert name_of(method) == name


def test_one_of_ours_lies_where_its_name_says(name: str, method: type[Pass], root: Path) -> None:
    if name not in own_names():
        pytest.skip("lives in another package")
    assert method.__module__ == f"compress.{name}"
    assert Path(inspect.getfile(method)) == root / "compress" / Path(*name.split(".")).with_suffix(".py")
    assert (root / "tests" / name.partition(".")[0] / f"test_{name.partition('.')[2]}.py").is_file()


def test_it_says_what_it_does_and_where_it_comes_from(name: str, method: type[Pass]) -> None:
    assert method.summary
    assert "\n" not in method.summary
    assert inspect.getdoc(method)
    assert sys.modules[method.__module__].__doc__, "the page of the method opens with the module's docstring"
    # A method without a paper says so itself; one that only forgot it inherits the silence of the base.
    assert "paper" in vars(method)
    if method.paper is not None:
        assert method.paper.title
        assert method.paper.url.startswith("https://")


def test_every_option_is_described(method: type[Pass]) -> None:
    assert described(method) == []


def test_no_option_takes_a_word_that_recipes_or_runs_use(method: type[Pass]) -> None:
    taken = {"use", "model", "out", "fresh", "plan", "print_recipe", "json", "quiet", "debug"}
    taken |= {"task", "seed", "device", "threads", "trust_remote_code"}
    taken |= {"calibration", "samples", "sequence_length", "batch_size"}
    assert not taken & set(method.model_fields)


def test_a_pass_is_a_value(method: type[Pass]) -> None:
    assert method.model_config.get("frozen") is True
    assert method.model_config.get("extra") == "forbid"
    assert not method.__subclasses__(), "a method is final"


def test_facts_hang_together(method: type[Pass]) -> None:
    assert not method.gives & method.breaks
    found = set(method.needs)
    if Fact.TRANSFORMERS in found:
        # Its weights are of one kind or the other.
        found |= {Fact.FLOAT_WEIGHTS, Fact.INTEGER_WEIGHTS}
    assert method.breaks <= found, "what it takes away it must have found there"


def test_options_survive_json_and_a_recipe(name: str, method: type[Pass]) -> None:
    required = {key for key, field in method.model_fields.items() if field.is_required()}
    if required:
        pytest.skip(f"has no default for {', '.join(sorted(required))}")
    built = method()
    assert method.model_validate_json(built.model_dump_json()) == built
    recipe = Recipe(model="m", steps=(Step.of(built),))
    assert recipe.steps[0].built() == built
    again = Recipe.from_yaml(recipe.dump())
    assert again.steps[0].use == name
    assert again.steps[0].built() == built
    assert again.dump() == recipe.dump()


def test_its_command_has_its_flags_and_those_of_a_run(name: str, method: type[Pass]) -> None:
    command, _ = command_of(name)
    flags = {flag for parameter in command.params for flag in parameter.opts}
    assert {spelling(key, field) for key, field in method.model_fields.items()} <= flags
    assert flags >= RUN_FLAGS


def test_its_help_shows_options_examples_and_paper(name: str, method: type[Pass]) -> None:
    command, ctx = command_of(name)
    text = command.get_help(ctx)
    flat = "".join(text.split())
    for key, field in method.model_fields.items():
        assert spelling(key, field) in text
        assert "".join((field.description or "").split()) in flat
    for example in method.examples:
        assert f"compress {name.replace('.', ' ')} MODEL --out DIR {example}" in text
    if method.paper is not None:
        assert method.paper.url in text


def test_its_examples_are_true(name: str, method: type[Pass], capsys: pytest.CaptureFixture[str]) -> None:
    assert method.examples, "show at least one worked example"
    for example in method.examples:
        words = [*name.split("."), "some/model", "--out", "somewhere", *example.split(), "--print-recipe"]
        assert app.main(words) == 0, capsys.readouterr().err
        assert yaml.safe_load(capsys.readouterr().out)["steps"][0]["use"] == name


def test_an_unknown_option_is_refused_with_the_nearest(
    name: str, method: type[Pass], capsys: pytest.CaptureFixture[str]
) -> None:
    if not method.model_fields:
        pytest.skip("has no options")
    key = next(iter(method.model_fields))
    flag = spelling(key, method.model_fields[key])
    assert app.main([*name.split("."), "some/model", f"{flag}x", "1"]) == 2
    error = capsys.readouterr().err
    assert f"unknown flag '{flag}x'" in error
    assert "did you mean" in error
    with pytest.raises(CompressError, match="did you mean"):
        Recipe.from_yaml(f"model: m\nsteps: [{{use: {name}, {key}x: 1}}]")


def test_the_schema_holds_it(name: str, method: type[Pass]) -> None:
    document = schema()
    assert set(document["$defs"][name]["properties"]) == {"use", *method.model_fields}
    validator = jsonschema.Draft202012Validator(document)
    required = any(field.is_required() for field in method.model_fields.values())
    assert validator.is_valid({"model": "m", "steps": [{"use": name}]}) is not required
    assert not validator.is_valid({"model": "m", "steps": [{"use": name, "no_such_option": 1}]})


def test_its_page_is_there(name: str, method: type[Pass], root: Path) -> None:
    page = method_page(name)
    assert page.startswith("<!--")
    assert f"# {name}" in page
    assert all(f"`{key}`" in page for key in method.model_fields)
    if name in own_names():
        written = root / "docs" / "methods" / f"{name}.md"
        assert written.read_text(encoding="utf-8") == page, "run `make docs`"


def test_a_source_without_what_it_needs_is_refused_before_anything_is_written(
    name: str, method: type[Pass], tmp_path: Path
) -> None:
    from compress import engine

    if not method.needs and not method.needs_one_of:
        pytest.skip("needs nothing")
    if any(field.is_required() for field in method.model_fields.values()):
        pytest.skip("has options without a default")
    source = bare_source(tmp_path, method)
    before = sorted(tmp_path.rglob("*"))
    recipe = Recipe(model=str(source), steps=(Step(use=name),))
    with pytest.raises(PlanError, match=f"{name}.*needs"):
        engine.plan(recipe, tmp_path / "out", single=True)
    assert sorted(tmp_path.rglob("*")) == before


def bare_source(folder: Path, method: type[Pass]) -> Path:
    """A model folder that lacks something that the method needs."""
    from compress.core.artifact import Artifact

    graph = folder / "graph"
    graph.mkdir()
    (graph / "model.onnx").write_bytes(b"")
    weights = folder / "weights"
    weights.mkdir()
    (weights / "config.json").write_text(json.dumps({"quantization_config": {}}), encoding="utf-8")
    (weights / "model.safetensors").write_bytes(b"")
    for source in (graph, weights):
        facts = Artifact.open(source).facts
        if method.needs - facts or (method.needs_one_of and method.needs_one_of.isdisjoint(facts)):
            return source
    raise AssertionError(f"no source here lacks {method.needs}")


def test_nothing_heavy_is_imported_to_know_a_method() -> None:
    code = (
        "import sys, json\n"
        "from compress.core import passes\n"
        "found = {}\n"
        "for name in passes.names():\n"
        "    passes.find(name)\n"
        f"    found[name] = [module for module in {HEAVY!r} if module in sys.modules]\n"
        "print(json.dumps(found))\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name: heavy for name, heavy in json.loads(answer.stdout).items() if heavy} == {}


def test_the_source_of_a_method_says_no_other_method(name: str, method: type[Pass]) -> None:
    tree = ast.parse(inspect.getsource(sys.modules[method.__module__]))
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    plain = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    imported |= {alias.name for node in plain for alias in node.names}
    others = {f"compress.{other}" for other in own_names() if other != name}
    assert not imported & others
