"""One cell of the hqq package; runs in its own environment.

Every linear layer of the blocks becomes an `HQQLinear`, as its users do it, with the options of
`BaseQuantizeConfig` as they are. Scales and zero points are real numbers of 16 bits: the grid is
asymmetric, and finer than what integer zero points allow (at 4 bits it rounds them itself).

The dense weights are computed in float32 from its integers, scales and zero points; their rounding to
16 bits must equal its own dequantization.
"""

from cell import Clock, Preset, automatic_class, parse_cell, write_cell  # first: it starts the clock

# ruff: isort: split
from typing import Any

PRESETS: dict[str, Preset] = {
    "default": Preset("hqq", {}, standard=True, calibrated=False, symmetric=False),
}

TOLERANCE = 2.0**-9  # of float16's own arithmetic, relative to the largest weight


def block_layers(model: Any) -> dict[str, Any]:
    """The linear layers inside the model's blocks, by name."""
    import torch

    stacks = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(name.startswith(f"{stack}.") for stack in stacks)
    }


def dense_weight(layer: Any) -> Any:
    """The weight of an `HQQLinear` in float32, by (q - zero) * scale."""
    import torch
    from hqq.core.quantize import Quantizer

    meta = layer.meta
    integers = Quantizer.unpack[meta["packing"]](layer.W_q, dtype=torch.float32)
    groups = meta["shape"][0] * meta["shape"][1] // meta["group_size"]
    centred = integers[:groups] - meta["zero"].float()  # its form of 3 bits pads the rows
    return (centred * meta["scale"].float()).reshape(meta["shape"])


def main() -> None:
    cell = parse_cell((__doc__ or "").splitlines()[0], PRESETS)

    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = automatic_class(cell.model).from_pretrained(cell.model, dtype="auto")
    bits, group_size = cell.rounding.bits, cell.rounding.group_size
    options = BaseQuantizeConfig(nbits=bits, group_size=group_size, **PRESETS[cell.preset].settings)
    layers = block_layers(model)
    clock = Clock()
    with clock.measure():
        made = {
            name: HQQLinear(layer, options, compute_dtype=torch.float16, device="cpu", del_orig=False)
            for name, layer in layers.items()
        }
    clock.finish()

    dense = {}
    for name, layer in made.items():
        dense[f"{name}.weight"] = weight = dense_weight(layer)
        largest = float((weight - layer.dequantize().float()).abs().max() / weight.abs().max())
        if largest > TOLERANCE:
            raise ValueError(f"{name}: differs from hqq's own dequantization by {largest:.1e}")
    write_cell(
        cell,
        dense,
        settings=PRESETS[cell.preset].settings,
        clock=clock,
        packages=("hqq", "transformers", "torch"),
        source="its integers, scales and zero points in memory",
        compared_with=f"its own dequantization (float16), within {TOLERANCE:.1e} of the largest weight",
    )


if __name__ == "__main__":
    main()
