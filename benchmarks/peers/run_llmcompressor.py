"""One cell of llm-compressor's GPTQ; runs in llm-compressor's own environment.

The dense weights are read from the compressed-tensors folder that it saved. Their rounding to
the model's dtype must equal the weights that it computed with before it packed them.

A preset's `actorder: static` is llm-compressor's default. `weight` visits columns by activation
too, but there each group has been updated by the time that its scale is used; both leave a file
without `g_idx`. The observer is how a group's scale is chosen: minimum and maximum (default),
least squared error over shrunken ranges, or that error weighted by the mean square of each
input (`imatrix_mse`, its best at low widths).
"""

from cell import Clock, parse_cell, write_cell  # first: it starts the clock

# ruff: isort: split
import shutil
from typing import Any

from calibration import read_draw
from dequantize import compressed_tensors

WIDE_SEARCH = {"maxshrink": 0.8, "patience": 100}

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "mse": {"observer": "memoryless_mse"},
    "mse-wide": {"observer": "memoryless_mse", "observer_kwargs": WIDE_SEARCH},
    "imatrix": {"observer": "imatrix_mse"},
    "weight-order": {"actorder": "weight"},
    "weight-order-imatrix": {"actorder": "weight", "observer": "imatrix_mse"},
    "float32": {"dtype": "float32"},
    "imatrix-float32": {"dtype": "float32", "observer": "imatrix_mse"},
}


def main() -> None:
    cell = parse_cell((__doc__ or "").splitlines()[0], PRESETS)
    settings = PRESETS[cell.preset]

    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = read_draw(cell.calibration)
    weights: dict[str, Any] = {
        "num_bits": cell.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": cell.group_size,
    }
    weights |= {key: settings[key] for key in ("observer", "observer_kwargs") if key in settings}
    modifier: dict[str, Any] = {
        "config_groups": {"body": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    modifier |= {key: settings[key] for key in ("actorder",) if key in settings}

    model = AutoModelForCausalLM.from_pretrained(cell.model, dtype=settings.get("dtype", "auto"))
    dataset = Dataset.from_dict(
        {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    )
    clock = Clock()
    with clock.measure():
        oneshot(
            model=model,
            processor=AutoTokenizer.from_pretrained(cell.model),
            dataset=dataset,
            recipe=GPTQModifier(**modifier),
            max_seq_length=tokens.shape[1],
            num_calibration_samples=tokens.shape[0],
            shuffle_calibration_samples=False,
        )
    computed = {name: value.detach().clone() for name, value in model.named_parameters()}

    saved = cell.out / "saved"
    shutil.rmtree(saved, ignore_errors=True)
    model.save_pretrained(saved, save_compressed=True)
    dense = compressed_tensors(saved, cell.bits, cell.group_size)
    for name, tensor in dense.items():
        if not torch.equal(tensor.to(model.dtype), computed[name].to(model.dtype)):
            raise ValueError(f"{name}: the saved weight is not the weight that was computed with")
    write_cell(
        cell,
        dense,
        settings=settings,
        clock=clock,
        packages=("llmcompressor", "compressed-tensors", "transformers", "torch"),
        source="compressed-tensors pack-quantized, read from disk in float32",
        compared_with=f"the quantized weights in memory before packing ({model.dtype}), equal",
    )


if __name__ == "__main__":
    main()
