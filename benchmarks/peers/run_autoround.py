"""One cell of AutoRound; runs in AutoRound's own environment.

It is asked for two forms of one result. The dense weights are read from the GPTQ folder, whose scales
have 16 bits; they must round to the weights of the other form (`fake`), which is what it has computed
with, in the model's precision. Its default is 200 iterations.
"""

from cell import Cell, Clock, Preset, automatic_class, parse_cell, write_cell  # first: it starts the clock

# ruff: isort: split
import shutil
from pathlib import Path
from typing import Any

from calibration import read_draw
from dequantize import changed_floats, gptq

PRESETS: dict[str, Preset] = {
    "default": Preset("autoround", {}, standard=True),
    "best": Preset("autoround", {"iters": 1000}),
}

FORMATS = "auto_gptq,fake"


def quantize(cell: Cell, model: Any, folder: Path) -> list[Path]:
    """Quantize and save; returns the folder of each of `FORMATS`."""
    import torch
    from auto_round import AutoRound
    from auto_round.schemes import QuantizationScheme
    from transformers import AutoTokenizer

    tokens = read_draw(cell.draw())
    learner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(cell.model),
        scheme=QuantizationScheme(
            bits=cell.rounding.bits, group_size=cell.rounding.group_size, sym=True, data_type="int"
        ),
        dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens],
        nsamples=tokens.shape[0],
        seqlen=tokens.shape[1],
        device_map="cpu",
        **PRESETS[cell.preset].settings,
    )
    _, folders = learner.quantize_and_save(str(folder), format=FORMATS)
    return [Path(each) for each in folders]


def main() -> None:
    cell = parse_cell((__doc__ or "").splitlines()[0], PRESETS)

    import torch
    from transformers import AutoTokenizer  # noqa: F401 - what it needs anyway, outside the clock

    model = automatic_class(cell.model).from_pretrained(cell.model, dtype="auto")
    dtype = model.dtype
    saved = cell.out / "saved"
    shutil.rmtree(saved, ignore_errors=True)
    clock = Clock()
    with clock.measure():
        packed, fake = quantize(cell, model, saved)
    clock.finish()

    dense = gptq(packed, cell.rounding.bits, cell.rounding.group_size)
    computed = changed_floats(fake, cell.model)
    if sorted(computed) != sorted(dense):
        raise ValueError(f"{sorted(set(computed) ^ set(dense))[0]}: in one form of the result only")
    for name, tensor in dense.items():
        if not torch.equal(tensor.to(dtype), computed[name].to(dtype)):
            raise ValueError(f"{name}: the saved weight is not the weight that was computed with")
    write_cell(
        cell,
        dense,
        settings=PRESETS[cell.preset].settings,
        clock=clock,
        packages=("auto-round", "transformers", "torch"),
        source="GPTQ format version 1, read from disk in float32",
        compared_with=f"its dense weights of the same run ({dtype}), equal",
    )


if __name__ == "__main__":
    main()
