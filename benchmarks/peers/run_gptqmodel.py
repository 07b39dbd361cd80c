"""One cell of GPTQModel's GPTQ; runs in GPTQModel's own environment.

The dense weights are read from the GPTQ folder that it saved. They must equal what its own
kernel for plain torch dequantizes from the same folder.

Its default visits columns by activation within a group and groups by their largest activation
(`act_group_aware`), which needs no `g_idx`; `desc_act` is the order over all columns, which does.
`mse` is the exponent of the error that its search over shrunken ranges minimises; 0, the default,
takes the range as it is. `gptaq` also corrects for the difference between the inputs of the
quantized and of the original model, and is a method beyond GPTQ.
"""

from cell import Clock, parse_cell, write_cell  # first: it starts the clock

# ruff: isort: split
import os
import shutil
from typing import Any

from calibration import read_draw
from dequantize import gptq

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "mse": {"mse": 2.4},
    "desc-act": {"desc_act": True, "act_group_aware": False},
    "desc-act-mse": {"desc_act": True, "act_group_aware": False, "mse": 2.4},
    "mse-damp1": {"mse": 2.4, "damp_percent": 0.01},
    "mse-float32": {"mse": 2.4, "dtype": "float32"},
    "gptaq-mse": {"gptaq": {}, "mse": 2.4},
}

CORES_IT_ASKS_FOR = 8


def main() -> None:
    cell = parse_cell((__doc__ or "").splitlines()[0], PRESETS)
    settings = PRESETS[cell.preset]

    cores = os.cpu_count() or 1
    if cores < CORES_IT_ASKS_FOR:  # it refuses to start; the threads stay as given
        os.cpu_count = lambda: CORES_IT_ASKS_FOR

    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import GPTAQConfig

    torch.set_num_threads(cell.threads)
    tokens = read_draw(cell.calibration)
    options = {key: value for key, value in settings.items() if key != "dtype"}
    if "gptaq" in options:
        options["gptaq"] = GPTAQConfig(**options["gptaq"])
    configuration = QuantizeConfig(bits=cell.bits, group_size=cell.group_size, sym=True, **options)
    dtype = getattr(torch, settings["dtype"]) if "dtype" in settings else "auto"
    model = GPTQModel.load(str(cell.model), configuration, device="cpu", dtype=dtype)
    clock = Clock()
    with clock.measure():
        model.quantize(
            [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens],
            batch_size=8,
        )
    saved = cell.out / "saved"
    shutil.rmtree(saved, ignore_errors=True)
    model.save(str(saved))

    dense = gptq(saved, cell.bits, cell.group_size)
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
        settings=settings,
        clock=clock,
        packages=("gptqmodel", "transformers", "torch"),
        source="GPTQ format version 1, read from disk in float32",
        compared_with=f"GPTQModel's own torch kernel on that folder ({own.dtype}), equal",
    )


if __name__ == "__main__":
    main()
