"""On a GPU: the sweep gives what it gives on a CPU, within the precision of the arithmetic."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compress import engine
from compress.core.artifact import Artifact
from compress.core.recipe import Recipe
from tests import models_zoo

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "mixtral", "gemma3"])
@pytest.mark.parametrize("method", ["quantize.rtn", "quantize.hqq", "quantize.gptq", "quantize.autoround"])
def test_a_gpu_run_verifies_and_is_as_good_as_on_a_cpu(name: str, method: str, tmp_path: Path) -> None:
    model = models_zoo.write(name, tmp_path)
    save_file({"input_ids": models_zoo.tokens(64, 32)}, tmp_path / "tokens.safetensors")
    errors = {}
    for device in ("cpu", "cuda"):
        recipe = Recipe.of(
            {
                "model": str(model),
                "device": device,
                "data": {
                    "calibration": str(tmp_path / "tokens.safetensors"),
                    "samples": 64,
                    "sequence_length": 32,
                },
                "steps": [{"use": method, "group_size": 16}],
            }
        )
        result = engine.run(recipe, tmp_path / device, single=True)
        lineage = Artifact.open(result.final).lineage
        assert lineage is not None
        errors[device] = [meant.error for meant in lineage.tensors.values() if meant.changed]
    torch.testing.assert_close(
        torch.tensor(errors["cuda"]), torch.tensor(errors["cpu"]), rtol=0.05, atol=0.005
    )
