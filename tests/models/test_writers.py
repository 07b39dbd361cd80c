"""Which layer adds last to the hidden state: against the architectures, whose sources say it."""

from pathlib import Path

import pytest
import torch

from compress.core.artifact import Artifact
from compress.core.errors import PlanError
from compress.models.load import skeleton
from compress.models.writers import last_writers
from tests import models_zoo

LAST = {
    "llama": "mlp.down_proj",
    "qwen2-sliding": "mlp.down_proj",
    "mistral": "mlp.down_proj",
    "gpt2": "mlp.c_proj",
    "opt": "fc2",
    # Attention and MLP side by side: the one with more inputs.
    "gpt-neox": "mlp.dense_4h_to_h",
    "phi": "mlp.fc2",
    "modernbert": "mlp.Wo",
}
NONE = ("bert", "gemma2", "gemma3", "mixtral", "qwen2-moe")


@pytest.mark.parametrize("name", LAST)
def test_it_is_the_layer_that_ends_the_block(name: str, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write(name, tmp_path))
    found = last_writers(skeleton(source, dtype=torch.float64))
    assert len(found) == 3
    assert {writer.layer for writer in found.values()} == {LAST[name]}
    assert all(writer.scale == pytest.approx(1, abs=1e-4) for writer in found.values())


@pytest.mark.parametrize("name", NONE)
def test_a_norm_behind_it_or_experts_leave_none(name: str, tmp_path: Path) -> None:
    source = Artifact.open(models_zoo.write(name, tmp_path))
    with pytest.raises(PlanError, match="adds to the hidden state as it is"):
        last_writers(skeleton(source, dtype=torch.float64))
