"""A tiny language model with a tokenizer, its compressed version, and a text."""

from pathlib import Path

import pytest

from tests import models_zoo, quantized_models

STORY = "The quick brown fox jumps over the lazy dog, and then it sleeps. "


@pytest.fixture(scope="session")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that reads characters."""
    folder = models_zoo.write("llama", tmp_path_factory.mktemp("models"))
    return quantized_models.add_tokenizer(folder, models_zoo.VOCABULARY)


@pytest.fixture(scope="session")
def after(before: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same at 4 bits in groups of 32."""
    return quantized_models.write(before, tmp_path_factory.mktemp("models") / "int4", bits=4, group=32)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents."""
    file = tmp_path_factory.mktemp("text") / "stories.txt"
    file.write_text("<|endoftext|>".join(STORY * (index + 1) for index in range(6)))
    return file
