"""A teacher, a student of another size and their text, all over one vocabulary of characters."""

from pathlib import Path
from typing import Any

from compress.core.recipe import Recipe
from tests import models_zoo, quantized_models

SMALL: dict[str, Any] = {
    "window": 16,
    "batch": 4,
    "learning_rate": 3e-3,
    "evaluation_tokens": 128,
    "precision": "float32",
}
"""What makes a training short, however many tokens it reads."""


def write(folder: Path) -> Path:
    """Put all three into a folder."""
    for name, layers, seed in (("teacher", 3, 1), ("student", 2, 2)):
        models_zoo.build("llama-tied", seed=seed, num_hidden_layers=layers).save_pretrained(folder / name)
        quantized_models.add_tokenizer(folder / name, models_zoo.VOCABULARY)
    write_text(folder)
    return folder


def write_text(folder: Path) -> None:
    """Random characters that the tokenizer of these models knows, in ``text.txt``."""
    characters = models_zoo.tokens(1, 4000, seed=5)[0].tolist()
    (folder / "text.txt").write_text("".join(chr(29 + number) for number in characters).replace(" ", "x"))


def recipe(
    place: Path,
    *,
    teacher: str | None = None,
    model: Any = None,
    data: dict[str, Any] | None = None,
    **options: Any,
) -> Recipe:
    """The student learns from the teacher on the text, each of them unless another is given."""
    step = {"use": "distill.logits", "tokens": 1_280, **SMALL, **options}
    step["teacher"] = str(place / "teacher") if teacher is None else teacher
    return Recipe.of(
        {
            "model": str(model or place / "student"),
            "threads": 1,
            "device": "cpu",
            "data": {"train": str(place / "text.txt")} if data is None else data,
            "steps": [step],
        }
    )
