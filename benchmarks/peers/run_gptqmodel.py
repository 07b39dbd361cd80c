"""One cell of GPTQModel's GPTQ; runs in GPTQModel's own environment.

The dense weights are read from the GPTQ folder that it saved. They must equal what its own
kernel for plain torch dequantizes from the same folder.

Its default visits columns by activation within a group and groups by their largest activation
(`act_group_aware`), which needs no `g_idx`; `desc_act` is the order over all columns, which does.
`mse` is the exponent of the error that its search over shrunken ranges minimises; 0, the default,
takes the range as it is. `gptaq` also corrects for the difference between the inputs of the
quantized and of the original model, and is a method beyond GPTQ.
"""

from cell import Cell, Clock, Preset, parse_cell, write_cell  # first: it starts the clock

# ruff: isort: split
import os
import shutil
from pathlib import Path
from typing import Any

from calibration import read_draw
from dequantize import gptq

PRESETS: dict[str, Preset] = {
    "default": Preset("gptq", {}, standard=True),
    "mse": Preset("gptq", {"mse": 2.4}),
    "desc-act": Preset("gptq", {"desc_act": True, "act_group_aware": False}),
    "desc-act-mse": Preset("gptq", {"desc_act": True, "act_group_aware": False, "mse": 2.4}),
    "mse-damp1": Preset("gptq", {"mse": 2.4, "damp_percent": 0.01}),
    "mse-float32": Preset("gptq", {"mse": 2.4, "dtype": "float32"}),
    "gptaq-mse": Preset("gptq", {"gptaq": {}, "mse": 2.4}),
}

CORES_IT_ASKS_FOR = 8


def start(cell: Cell) -> None:
    """Import it, where it says that there are too few cores; the threads stay as given."""
    cores = os.cpu_count() or 1
    if cores < CORES_IT_ASKS_FOR:  # it refuses to start
        os.cpu_count = lambda: CORES_IT_ASKS_FOR

    import gptqmodel  # noqa: F401 - it looks at the cores when it is imported
    import torch

    torch.set_num_threads(cell.threads)


def load(cell: Cell) -> Any:
    """The model with the preset's configuration."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import GPTAQConfig

    settings = PRESETS[cell.preset].settings
    options = {key: value for key, value in settings.items() if key != "dtype"}
    if "gptaq" in options:
        options["gptaq"] = GPTAQConfig(**options["gptaq"])
    bits, group_size = cell.rounding.bits, cell.rounding.group_size
    configuration = QuantizeConfig(bits=bits, group_size=group_size, sym=True, **options)
    dtype = getattr(torch, settings["dtype"]) if "dtype" in settings else "auto"
    return GPTQModel.load(str(cell.model), configuration, device="cpu", dtype=dtype)


def quantize(cell: Cell, model: Any) -> None:
    """Quantize the model in place."""
    import torch

    tokens = read_draw(cell.draw())
    model.quantize(
        [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens],
        batch_size=8,
    )


def save(cell: Cell, model: Any) -> Path:
    """Write the packed model; returns its folder."""
    saved = cell.out / "saved"
    shutil.rmtree(saved, ignore_errors=True)
    model.save(str(saved))
    return saved


def main() -> None:
    cell = parse_cell((__doc__ or "").splitlines()[0], PRESETS)
    start(cell)

    import torch
    from gptqmodel import BACKEND, GPTQModel

    model = load(cell)
    clock = Clock()
    with clock.measure():
        quantize(cell, model)
    saved = save(cell, model)
    clock.finish()

    dense = gptq(saved, cell.rounding.bits, cell.rounding.group_size)
    served = GPTQModel.load(
        str(saved),
        device="cpu",
        backend=BACKEND.TORCH,
        dtype=torch.float16,  # as the scales are
    )
    layers = dict(served.model.named_modules())
    for name, tensor in dense.items():
        own = layers[name.removesuffix(".weight")].dequantize_weight().t()
        if not torch.equal(tensor.to(own.dtype), own):
            raise ValueError(f"{name}: the saved weight is not what GPTQModel dequantizes")
    write_cell(
        cell,
        dense,
        settings=PRESETS[cell.preset].settings,
        clock=clock,
        packages=("gptqmodel", "transformers", "torch"),
        source="GPTQ format version 1, read from disk in float32",
        compared_with=f"GPTQModel's own torch kernel on that folder ({own.dtype}), equal",
    )


if __name__ == "__main__":
    main()
