"""Small models that lose blocks, and the big ones whose blocks are passed by, for tests of depth pruning."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from compress import engine
from compress.core.artifact import Artifact
from compress.models.blocks import find_blocks
from compress.sweep import shortening
from compress.sweep.depth_choice import Judgement
from tests import models_zoo

SAMPLES, LENGTH = 6, 16


def calibration(folder: Path, samples: int = SAMPLES) -> dict[str, Any]:
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


def recipe_of(source: Path, folder: Path, samples: int = SAMPLES, **options: Any) -> dict[str, Any]:
    return {
        "model": str(source),
        "steps": [{"use": "prune.depth", **options}],
        "data": calibration(folder, samples),
        "threads": 1,
        "device": "cpu",
    }


def prune(source: Path, out: Path, reporter: Any = None, samples: int = SAMPLES, **options: Any) -> Artifact:
    extra = {} if reporter is None else {"reporter": reporter}
    recipe = recipe_of(source, out.parent, samples, **options)
    return Artifact.open(engine.run(recipe, out, single=True, **extra).final)


def five_layers(folder: Path) -> Path:
    """A Llama whose third block does next to nothing, and the fifth little."""
    config = models_zoo.configuration("llama")
    config.num_hidden_layers = 5
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for number, factor in ((2, 1e-3), (4, 0.3)):
            for layer in (
                model.model.layers[number].self_attn.o_proj,
                model.model.layers[number].mlp.down_proj,
            ):
                layer.weight.mul_(factor)
    model.save_pretrained(folder / "five")
    return folder / "five"


def going(monkeypatch: pytest.MonkeyPatch, *gone: int) -> None:
    """Let certain blocks go, whatever they do."""
    measured = {number: float(number not in gone) for number in range(8)}
    judgement = Judgement(gone, "influence", measured, {}, SAMPLES * LENGTH)
    monkeypatch.setattr(shortening, "_judged", lambda *_: judgement)


def decisions(artifact: Artifact) -> dict[str, Any]:
    assert artifact.lineage is not None
    return dict(artifact.lineage.steps[-1].decisions)


def numbers(text: str) -> list[int]:
    """Numbers from ``0-3 5``."""
    ends = [part.split("-") for part in text.split()]
    return [number for end in ends for number in range(int(end[0]), int(end[-1]) + 1)]


def loaded(folder: Path) -> Any:
    """The model as its users load it; nothing missing, nothing unexpected, nothing of another shape."""
    name = Artifact.open(folder).config["architectures"][0]
    model, said = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(said.values()), said
    return model.eval()


def without(model: Any, gone: Sequence[int]) -> Any:
    """The big model whose blocks that go hand on what they are given."""

    def passing(module: nn.Module) -> Any:
        forward = module.forward

        def passed(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else next(iter(kwargs.values()))
            came = hidden.clone()
            said = forward(*args, **kwargs)
            return came if isinstance(said, torch.Tensor) else (came, *said[1:])

        return passed

    for block in find_blocks(model):
        if block.position in gone:
            block.module.forward = passing(block.module)
    return model


def outputs(model: Any, tokens: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        tokens = models_zoo.tokens(3, 12, seed=7) if tokens is None else tokens
        more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
        first: torch.Tensor = model(input_ids=tokens, **more)[0]
    return first


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found
