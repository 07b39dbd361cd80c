"""What the tests of the engine share: a small model, and recipes over it."""

from pathlib import Path
from typing import Any

import pytest

from compress.core.recipe import Recipe
from tests import models_zoo

RTN: dict[str, Any] = {"use": "quantize.rtn", "group_size": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models_zoo.write("llama", tmp_path_factory.mktemp("model"))


def recipe(model: Path, *steps: dict[str, Any], **others: Any) -> Recipe:
    return Recipe.of({"model": str(model), "steps": list(steps), "threads": 1, **others})
