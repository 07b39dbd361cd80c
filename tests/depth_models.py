"""Small models that lose blocks, and the big ones whose blocks are passed by, for tests of depth pruning."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.models.blocks import find_blocks
from compress.sweep import shortening
from compress.sweep.depth_choice import Judgement
from tests import models_zoo
from tests.single_steps import LENGTH, SAMPLES, applied

prune = partial(applied, "prune.depth")


def five_layers(folder: Path) -> Path:
    """A Llama whose third block does next to nothing, and the fifth little."""
    model = models_zoo.build("llama", num_hidden_layers=5)
    with torch.no_grad():
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
