"""The shipped recipes: they fit their methods, say how they are used, and carry gates."""

from pathlib import Path

import jsonschema
import pytest
import yaml

from compress.core.recipe import Recipe, schema

FOLDER = Path(__file__).resolve().parents[2] / "recipes"


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
