"""Writing weight files tensor by tensor, and the index that ties them.

The safetensors library writes a file in one call from tensors that are all in memory. A shard is written
here one tensor at a time, so that a copy needs no more memory than its largest tensor, and so that a
file appears under its name only when it is complete.
https://github.com/huggingface/safetensors#format
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

INDEX_FILE = "model.safetensors.index.json"

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def shard_name(index: int, total: int) -> str:
    """The file name of one shard; ``index`` counts from 0."""
    return "model.safetensors" if total == 1 else f"model-{index + 1:05d}-of-{total:05d}.safetensors"


def write_shard(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensor: Callable[[str], torch.Tensor],
    before: Callable[[str], None],
) -> int:
    """Write one file and give it its name when it is complete.

    Args:
        path: where the file will be; it is written beside, as ``.NAME.partial``.
        layout: dtype and shape of each tensor.
        tensor: brings one tensor; called once for each, in the order of the file.
        before: told the name of a tensor before it is written.

    Returns:
        the bytes of all tensors.
    """
    # Wide types first, so that every tensor starts at a multiple of its own width.
    order = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        dtype, shape = layout[name]
        size = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as stream:
        stream.write(len(head).to_bytes(8, "little"))
        stream.write(head)
        for name in order:
            before(name)
            value = tensor(name).detach().to("cpu").contiguous()
            dtype, shape = layout[name]
            if value.dtype != dtype or tuple(value.shape) != tuple(shape):
                raise ValueError(
                    f"{name}: {value.dtype} {tuple(value.shape)} is not the layout's {dtype} {shape}"
                )
            stream.write(value.reshape(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    return offset


def write_index(folder: Path, files: Mapping[str, Iterable[str]], total_bytes: int) -> None:
    """Write the index: which tensor is in which file."""
    weight_map = {name: file for file, names in files.items() for name in names}
    document = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
