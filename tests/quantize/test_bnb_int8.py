"""LLM.int8() artifacts; that their bytes are those of transformers is held in test_bnb_nf4.py for both."""

from pathlib import Path

import torch
import transformers

from compress import engine
from tests import models_zoo


def test_every_weight_is_within_half_a_step(tmp_path: Path) -> None:
    model = models_zoo.write("llama", tmp_path)
    recipe = {"model": str(model), "device": "cpu", "steps": [{"use": "quantize.bnb_int8"}]}
    folder = engine.run(recipe, tmp_path / "out", single=True).final
    before = transformers.AutoModelForCausalLM.from_pretrained(model)
    after = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for name, module in after.named_modules():
        if type(module).__name__ == "Linear8bitLt":
            weight = before.get_submodule(name).weight
            value = module.weight.data.float() * (module.weight.SCB[:, None] / 127)
            step = weight.abs().amax(1, keepdim=True) / 127
            # Weights and magnitudes go through float16 on their way.
            assert ((value - weight).abs() <= 0.51 * step + 1e-3 * weight.abs()).all(), name
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)
