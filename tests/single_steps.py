"""One step on a tiny random model: how it is run, and what it left, as its users find it."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress import engine
from compress.core.artifact import LAYERS_FILE, RUN_FILE, Artifact
from tests import models_zoo
from tests.dummies import Killed, KillingRecorder, Recorder

SAMPLES, LENGTH = 6, 16


def calibration(folder: Path, samples: int = SAMPLES) -> dict[str, Any]:
    """Random tokens in a file of a folder, as the ``data`` of a recipe."""
    folder.mkdir(exist_ok=True)
    file = folder / "tokens.safetensors"
    save_file({"input_ids": models_zoo.tokens(samples, LENGTH)}, file)
    return {
        "calibration": str(file),
        "samples": samples,
        "sequence_length": LENGTH,
        # Three batches, however much text it is.
        "batch_size": -(-samples // 3),
    }


def recipe_of(
    use: str,
    source: Path,
    folder: Path,
    samples: int = SAMPLES,
    around: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """A recipe of one step.

    Args:
        use: name of the pass.
        source: the model.
        folder: where the calibration tokens go.
        samples: of them; 0 for a pass that reads none.
        around: what the recipe says beside its step.
        options: of the pass.
    """
    return {
        "model": str(source),
        "steps": [{"use": use, **options}],
        "threads": 1,
        "device": "cpu",
        **({"data": calibration(folder, samples)} if samples else {}),
        **(around or {}),
    }


def applied(use: str, source: Path, out: Path, reporter: Any = None, **options: Any) -> Artifact:
    """What the engine made of a model with one step; options are those of `recipe_of`."""
    extra = {} if reporter is None else {"reporter": reporter}
    recipe = recipe_of(use, source, out.parent, **options)
    return Artifact.open(engine.run(recipe, out, single=True, **extra).final)


def killed_and_resumed(recipe: dict[str, Any], folder: Path, event: str, number: int) -> Recorder:
    """Run a recipe whole, and again, killed at an event and taken up: the bytes are the same.

    Returns:
        What was told while it was taken up.
    """
    whole = engine.run(recipe, folder / "whole", single=True).final
    with pytest.raises(Killed):
        engine.run(recipe, folder / "out", single=True, reporter=KillingRecorder(event, number))
    again = Recorder()
    resumed = engine.run(recipe, folder / "out", single=True, reporter=again).final
    found, expected = bytes_of(resumed), bytes_of(whole)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    return again


def bytes_of(artifact: Path) -> dict[str, bytes]:
    """All that must be the same: every file but the record of times and hosts; the table without seconds."""
    found = {
        str(file.relative_to(artifact)): file.read_bytes()
        for file in sorted(artifact.rglob("*"))
        if file.is_file() and file.name not in (RUN_FILE, LAYERS_FILE)
    }
    if (artifact / LAYERS_FILE).is_file():
        with (artifact / LAYERS_FILE).open(encoding="utf-8", newline="") as stream:
            rows = [{key: row[key] for key in row if key != "seconds"} for row in csv.DictReader(stream)]
        found[LAYERS_FILE] = json.dumps(rows).encode()
    return found


def decisions(artifact: Artifact) -> dict[str, Any]:
    """What the last step decided."""
    assert artifact.lineage is not None
    return dict(artifact.lineage.steps[-1].decisions)


def numbers(text: str) -> list[int]:
    """Numbers from ``0-3 5``, as decisions list them."""
    ends = [part.split("-") for part in text.split()]
    return [number for end in ends for number in range(int(end[0]), int(end[-1]) + 1)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the weight files of a folder."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def changed(artifact: Artifact) -> dict[str, torch.Tensor]:
    """The tensors that were meant to change, as they lie on disk."""
    assert artifact.lineage is not None
    meant = artifact.lineage.tensors
    return {name: tensor for name, tensor in tensors(artifact.path).items() if meant[name].changed}


def loaded(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The model as its users load it; nothing missing, nothing unexpected, nothing of another shape."""
    name = Artifact.open(folder).config["architectures"][0]
    # Experts that are computed together are not computed in double precision.
    options = {} if dtype is None else {"dtype": dtype, "experts_implementation": "eager"}
    model, said = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(said.values()), said
    return model.eval()


def outputs(model: Any, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """What a model says first, logits or hidden states, of a few random tokens where none are given."""
    tokens = models_zoo.tokens(3, 12, seed=7) if tokens is None else tokens
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        first: torch.Tensor = model(input_ids=tokens, **more)[0]
    return first
