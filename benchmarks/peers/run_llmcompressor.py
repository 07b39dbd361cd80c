"""One cell of llm-compressor: GPTQ, AWQ, rounding to nearest, Wanda or SparseGPT, in its own environment.

The dense weights are read from the folder that it saved, compressed-tensors or plain. Their rounding to the
model's dtype must equal the weights that it computed with before it saved them, or for AWQ and rounding to
nearest what stock transformers loads.

Of GPTQ, a preset's `actorder: static` is llm-compressor's default. `weight` visits columns by activation
too, but there each group has been updated by the time that its scale is used; both leave a file
without `g_idx`. The observer is how a group's scale is chosen: minimum and maximum (default),
least squared error over shrunken ranges, or that error weighted by the mean square of each
input (`imatrix_mse`, its best at low widths).
"""

from cell import Cell, Clock, Preset, automatic_class, parse_cell, write_cell  # first: it starts the clock

# ruff: isort: split
import shutil
from pathlib import Path
from typing import Any

from calibration import read_draw
from dequantize import changed_floats, compressed_tensors, require_equal
from schemes import Zeros

WIDE_SEARCH = {"maxshrink": 0.8, "patience": 100}

PRESETS: dict[str, Preset] = {
    "default": Preset("gptq", {}, standard=True),
    "mse": Preset("gptq", {"observer": "memoryless_mse"}),
    "mse-wide": Preset("gptq", {"observer": "memoryless_mse", "observer_kwargs": WIDE_SEARCH}),
    "imatrix": Preset("gptq", {"observer": "imatrix_mse"}),
    "weight-order": Preset("gptq", {"actorder": "weight"}),
    "weight-order-imatrix": Preset("gptq", {"actorder": "weight", "observer": "imatrix_mse"}),
    "float32": Preset("gptq", {"dtype": "float32"}),
    "imatrix-float32": Preset("gptq", {"dtype": "float32", "observer": "imatrix_mse"}),
    "rtn": Preset("rtn", {}, standard=True, calibrated=False),
    "awq": Preset("awq", {}, standard=True),
    "wanda": Preset("wanda"),
    "sparsegpt": Preset("sparsegpt"),
}

IN_PLACE = ("gptq", "wanda", "sparsegpt")
OUTSIDE_THE_BLOCKS = ["re:.*lm_head", "re:.*pooler.*"]
"""By pattern: its pruning calls the head `lm_head.` with a dot behind, which no plain name matches."""


def modifiers(cell: Cell) -> list[Any]:
    """The recipe of the preset."""
    return [pruner(cell)] if isinstance(cell.scheme, Zeros) else quantizers(cell)


def pruner(cell: Cell) -> Any:
    """Wanda or SparseGPT. Unlike ours they prune the head too when nobody leaves it out."""
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[PRESETS[cell.preset].method]
    what: dict[str, Any] = {"sparsity": cell.zeros.share, "ignore": OUTSIDE_THE_BLOCKS}
    if cell.zeros.pattern is not None:
        kept, of = cell.zeros.pattern
        what["mask_structure"] = f"{of - kept}:{of}"  # it counts what goes
    return modifier(**what)


def quantizers(cell: Cell) -> list[Any]:
    """The recipe of a preset that rounds."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    preset = PRESETS[cell.preset]
    weights: dict[str, Any] = {
        "num_bits": cell.rounding.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": cell.rounding.group_size,
    }
    weights |= {
        key: preset.settings[key] for key in ("observer", "observer_kwargs") if key in preset.settings
    }
    what: dict[str, Any] = {
        "config_groups": {"body": {"targets": ["Linear"], "weights": weights}},
        "ignore": OUTSIDE_THE_BLOCKS,
    }
    if preset.method == "gptq":
        order = {key: preset.settings[key] for key in ("actorder",) if key in preset.settings}
        return [GPTQModifier(**what, **order)]
    if preset.method == "awq":
        return [AWQModifier(), QuantizationModifier(**what)]
    return [QuantizationModifier(**what)]


def leave_memory_unpinned() -> None:
    """Without an accelerator, keep AWQ from pinning memory for it, which stops it on a CPU.

    Pinned memory is copied faster to a device; what is computed is the same.
    """
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_, **__: None


def load(cell: Cell) -> Any:
    """The model, in the precision that the preset asks for."""
    dtype = PRESETS[cell.preset].settings.get("dtype", "auto")
    return automatic_class(cell.model).from_pretrained(cell.model, dtype=dtype)


def quantize(cell: Cell, model: Any) -> None:
    """Quantize or prune the model in place."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoTokenizer

    leave_memory_unpinned()
    if not PRESETS[cell.preset].calibrated:
        oneshot(model=model, recipe=modifiers(cell))
        return
    tokens = read_draw(cell.draw())
    dataset = Dataset.from_dict(
        {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    )
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(cell.model),
        dataset=dataset,
        recipe=modifiers(cell),
        max_seq_length=tokens.shape[1],
        num_calibration_samples=tokens.shape[0],
        shuffle_calibration_samples=False,
    )


def save(cell: Cell, model: Any) -> Path:
    """Write the model, packed where it was quantized; returns its folder."""
    saved = cell.out / "saved"
    shutil.rmtree(saved, ignore_errors=True)
    model.save_pretrained(saved, save_compressed=True)
    return saved


def reference(cell: Cell, model: Any, saved: Path, computed: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What the saved weights must equal, in the model's precision, and how that is called.

    What prunes and GPTQ have put their weights into the model. The others leave floats there, to be rounded
    as they are packed, so what transformers loads again is taken.
    """
    if PRESETS[cell.preset].method in IN_PLACE:
        return computed, "the weights in memory before saving"
    from transformers.utils.quantization_config import CompressedTensorsConfig

    plain = CompressedTensorsConfig(run_compressed=False)
    loaded = automatic_class(cell.model).from_pretrained(saved, dtype=model.dtype, quantization_config=plain)
    return loaded.state_dict(), "the weights that stock transformers loads"


def main() -> None:
    cell = parse_cell((__doc__ or "").splitlines()[0], PRESETS)

    model = load(cell)
    clock = Clock()
    with clock.measure():
        quantize(cell, model)
    computed = {name: value.detach().clone() for name, value in model.named_parameters()}
    saved = save(cell, model)
    clock.finish()

    dense = changed_floats(saved, cell.model)
    source = "the float weights of the saved folder"
    if not isinstance(cell.scheme, Zeros):
        dense |= compressed_tensors(saved, cell.scheme.bits, cell.scheme.group_size)
        source = "compressed-tensors pack-quantized, read from disk in float32"
    expected, called = reference(cell, model, saved, computed)
    require_equal(dense, expected, model.dtype, called)
    write_cell(
        cell,
        dense,
        settings=PRESETS[cell.preset].settings,
        clock=clock,
        packages=("llmcompressor", "compressed-tensors", "transformers", "torch"),
        source=source,
        compared_with=f"{called} ({model.dtype}), equal",
    )


if __name__ == "__main__":
    main()
