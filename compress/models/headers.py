"""What a safetensors file says of itself, checked without reading a weight.

The library that reads weights trusts a file further than a tool may that is about to write hours of work
on top of it: here every byte has to be accounted for. https://github.com/huggingface/safetensors#format
"""

import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.core.errors import EnvironmentFault, ModelError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the format's own library."""

BITS: Mapping[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
"""Bits of one element of each type that the format knows."""

_DAMAGED = "download or copy the file again"


@dataclass(frozen=True)
class Tensor:
    """One entry of a header.

    Attributes:
        name: as stored.
        file: that holds it.
        dtype: the format's word for the type (``BF16``).
        shape: of the tensor.
        start: first byte, counted from the beginning of the file.
        end: behind the last byte.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_model(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, by name.

    Raises:
        ModelError: a file is damaged, a shard is missing, a tensor is missing, comes twice or is not in
            the index, or a weight file lies there that belongs to nothing.
        EnvironmentFault: a file may not be read.
    """
    present = {
        file.name: file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith(".")
    }
    index = _read_index(folder) if (folder / INDEX_FILE).is_file() else None
    if SINGLE_FILE in present and index is None:
        wanted = {SINGLE_FILE}
    elif index is not None:
        wanted = set(index.values())
    elif "adapter_model.safetensors" in present:
        raise ModelError(
            f"{folder} holds an adapter, expected a whole model",
            "merge it into its base model (merge_and_unload)",
        )
    else:
        raise ModelError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}", "is the download complete?")
    for name in sorted(wanted - present.keys()):
        raise ModelError(f"{folder / INDEX_FILE} names {name}, which is missing", "is the download complete?")
    for name in sorted(present.keys() - wanted):
        raise ModelError(
            f"{present[name]} belongs to no model: {INDEX_FILE if index else SINGLE_FILE} does not know it",
            "move stray weight files out of the folder",
        )
    tensors: dict[str, Tensor] = {}
    for name in sorted(wanted):
        for tensor in read_header(present[name]):
            if tensor.name in tensors:
                raise ModelError(
                    f"tensor '{tensor.name}' is in both {tensors[tensor.name].file.name} and {name}",
                    "remove the stale weight file",
                )
            tensors[tensor.name] = tensor
    if index is not None:
        _check_index(folder / INDEX_FILE, index, tensors)
    return tensors


def read_header(file: Path) -> list[Tensor]:
    """The tensors of one file in the order of their bytes.

    Raises:
        ModelError: the file is damaged, and how.
        EnvironmentFault: it may not be read.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            first = stream.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > min(size - 8, LARGEST_HEADER):
                raise ModelError(
                    f"{file} is truncated or no safetensors file: {size:,} bytes, a header of {length:,}",
                    _DAMAGED,
                )
            raw = stream.read(length)
    except PermissionError as error:
        raise EnvironmentFault(f"no permission to read {file}", "change its permissions") from error
    except OSError as error:
        raise EnvironmentFault(f"{file} cannot be read: {error.strerror or error}") from error
    header = _parse(file, raw)
    base = 8 + length
    tensors = sorted(
        (_entry(file, name, entry, base) for name, entry in header.items() if name != "__metadata__"),
        key=lambda tensor: (tensor.start, tensor.end),
    )
    _check_cover(file, tensors, base, size)
    return tensors


def _parse(file: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name comes twice")
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} has a damaged header: {error}", _DAMAGED) from error
    if not isinstance(header, dict):
        raise ModelError(f"{file} has a damaged header: no object", _DAMAGED)
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelError(f"{file} has a damaged header: __metadata__ is no map of strings", _DAMAGED)
    return header


def _entry(file: Path, name: str, entry: Any, base: int) -> Tensor:
    complaint = ""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        complaint = "it is not described by dtype, shape and data_offsets"
    elif entry["dtype"] not in BITS:
        complaint = f"unknown dtype {entry['dtype']!r}"
    elif not _natural(entry["shape"]):
        complaint = f"shape {entry['shape']!r}"
    elif not _natural(entry["data_offsets"]) or len(entry["data_offsets"]) != 2:
        complaint = f"data_offsets {entry['data_offsets']!r}"
    else:
        start, end = entry["data_offsets"]
        bits = math.prod(entry["shape"]) * BITS[entry["dtype"]]
        if bits % 8 or end - start != bits // 8:
            complaint = f"{end - start:,} bytes for {entry['dtype']} {entry['shape']}"
    if complaint:
        raise ModelError(f"{file} has a damaged header, tensor '{name}': {complaint}", _DAMAGED)
    return Tensor(name, file, entry["dtype"], tuple(entry["shape"]), base + start, base + end)


def _natural(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(file: Path, tensors: list[Tensor], base: int, size: int) -> None:
    """Every byte behind the header belongs to exactly one tensor."""
    if tensors and tensors[0].start != base:
        raise ModelError(f"{file} has a hole before tensor '{tensors[0].name}'", _DAMAGED)
    for before, after in itertools.pairwise(tensors):
        if after.start != before.end:
            fault = "overlap" if after.start < before.end else "have a hole between them"
            raise ModelError(f"{file} is damaged: '{before.name}' and '{after.name}' {fault}", _DAMAGED)
    end = tensors[-1].end if tensors else base
    if end != size:
        fault = "is truncated" if size < end else "has bytes that belong to no tensor"
        raise ModelError(f"{file} {fault}: {size:,} bytes, expected {end:,}", _DAMAGED)


def _read_index(folder: Path) -> dict[str, str]:
    file = folder / INDEX_FILE
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise EnvironmentFault(f"no permission to read {file}", "change its permissions") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON: {error}", _DAMAGED) from error
    weights = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(n, str) for n in weights.values()):
        raise ModelError(f"{file} holds no weight_map from tensors to files", _DAMAGED)
    for name in sorted(set(weights.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{file} names {name!r}, expected a safetensors file in the same folder",
                "pickled checkpoints are not loaded; convert the model with model.save_pretrained",
            )
    return dict(weights)


def _check_index(file: Path, index: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    for name, shard in index.items():
        if name not in tensors:
            raise ModelError(f"{file} names tensor '{name}' in {shard}, which does not hold it", _DAMAGED)
        if tensors[name].file.name != shard:
            raise ModelError(
                f"{file} names tensor '{name}' in {shard}, it is in {tensors[name].file.name}", _DAMAGED
            )
    for name in tensors:
        if name not in index:
            raise ModelError(f"{file} does not name tensor '{name}' of {tensors[name].file.name}", _DAMAGED)
