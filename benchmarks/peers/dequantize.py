"""Compressed weights read back from disk by their documented formats, as float32.

Reading every program's file with the same few lines, and none of the programs' own code, makes
the comparison one of the numbers that were saved. A runner then checks these tensors against
what its own program computes from the same file, so that an error here cannot pass unseen.

Both formats are one dense stream of bits, little end first, cut into 32-bit words:

- compressed-tensors, `pack-quantized`: along the input, an integer q stored as q + 2^(bits-1);
  one scale [rows, groups]; zero points, where there are any, stored like q, packed along the output.
- GPTQ version 1: the transpose, `qweight` [words, rows]; zeros stored minus one, packed along
  the output; `g_idx` names the group of each column, `scales` are [groups, rows].
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors shards."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(shard))
    return tensors


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` unsigned integers of each row of packed int32 words, as int64."""
    places = torch.arange(32, dtype=torch.int64)
    stream = (words.to(torch.int64).unsqueeze(-1) >> places) & 1
    stream = stream.flatten(-2)[..., : count * bits].reshape(*words.shape[:-1], count, bits)
    integers: torch.Tensor = (stream << torch.arange(bits, dtype=torch.int64)).sum(-1)
    return integers


def layers_with(tensors: dict[str, torch.Tensor], suffix: str) -> Iterator[str]:
    """The names of the layers that hold a tensor of this name; at least one, or an error."""
    names = [name.removesuffix("." + suffix) for name in tensors if name.endswith("." + suffix)]
    if not names:
        raise ValueError(f"no tensor named *.{suffix}: nothing was quantized")
    yield from names


def compressed_tensors(folder: Path, bits: int, group_size: int) -> dict[str, torch.Tensor]:
    """Dense weights of a `pack-quantized` folder, keyed by parameter name."""
    tensors = read_tensors(folder)
    dense = {}
    for layer in layers_with(tensors, "weight_packed"):
        rows, columns = (int(size) for size in tensors[f"{layer}.weight_shape"])
        integers = unpack(tensors[f"{layer}.weight_packed"], bits, columns) - 2 ** (bits - 1)
        scale = tensors[f"{layer}.weight_scale"].to(torch.float32)
        if integers.shape != (rows, columns):
            raise ValueError(f"{layer}: expected a weight of shape {[rows, columns]}")
        if scale.shape != (rows, columns // group_size):
            raise ValueError(f"{layer}: scales {list(scale.shape)} are not of group {group_size}")
        group = torch.arange(columns) // group_size
        if f"{layer}.weight_g_idx" in tensors:
            group = tensors[f"{layer}.weight_g_idx"].to(torch.int64)
        if (zeros := tensors.get(f"{layer}.weight_zero_point")) is not None:
            zeros = unpack(zeros.t(), bits, rows).t() - 2 ** (bits - 1)
            integers = integers - zeros[:, group]
        dense[f"{layer}.weight"] = integers.to(torch.float32) * scale[:, group]
    return dense


def gptq(folder: Path, bits: int, group_size: int) -> dict[str, torch.Tensor]:
    """Dense weights of a folder in the GPTQ format, version 1, keyed by parameter name."""
    tensors = read_tensors(folder)
    dense = {}
    for layer in layers_with(tensors, "qweight"):
        scales = tensors[f"{layer}.scales"].to(torch.float32)
        group = tensors[f"{layer}.g_idx"].to(torch.int64)
        columns, (groups, rows) = group.shape[0], scales.shape
        if groups != columns // group_size:
            raise ValueError(f"{layer}: {groups} groups of {columns} are not of size {group_size}")
        integers = unpack(tensors[f"{layer}.qweight"].t(), bits, columns)
        zeros = unpack(tensors[f"{layer}.qzeros"], bits, rows) + 1
        centred = integers.t() - zeros[group]
        dense[f"{layer}.weight"] = (centred.to(torch.float32) * scales[group]).t().contiguous()
    return dense


def require_equal(
    dense: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype, called: str
) -> None:
    """Hold weights that were read from disk against what the program computes with, in its precision.

    Raises:
        ValueError: a weight differs.
    """
    for name, tensor in dense.items():
        if not torch.equal(tensor.to(dtype), expected[name].to(dtype)):
            raise ValueError(f"{name}: the saved weight is not one of {called}")


def changed_floats(folder: Path, model: Path) -> dict[str, torch.Tensor]:
    """Float tensors of a folder that are not what the base model holds under the same name.

    Pruned weights are such floats; and a method that scales what it rounds has put the inverse into a norm
    or another layer.
    """
    base = read_tensors(model)
    return {
        name: tensor.to(torch.float32)
        for name, tensor in read_tensors(folder).items()
        if name in base
        and tensor.is_floating_point()
        and tensor.shape == base[name].shape
        and not torch.equal(tensor.to(torch.float32), base[name].to(torch.float32))
    }
