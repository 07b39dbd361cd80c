"""Weight files written tensor by tensor are what the safetensors library reads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from compress.formats.shards import shard_name, write_index, write_shard


def write(path: Path, tensors: dict[str, torch.Tensor], names: list[str] | None = None) -> int:
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_shard(path, layout, tensors.__getitem__, (names if names is not None else []).append)


def test_the_library_reads_every_type_and_shape(tmp_path: Path) -> None:
    tensors = {
        "a.half": torch.randn(3, 5).to(torch.bfloat16),
        "b.packed": torch.randint(-(2**31), 2**31 - 1, (4, 2), dtype=torch.int32),
        "c.scalar": torch.tensor(7),
        "d.bytes": torch.arange(7, dtype=torch.int8),
        "e.empty": torch.zeros(0, 4),
        "f.double": torch.randn(2, dtype=torch.float64),
        "g.transposed": torch.randn(3, 4).T,
    }
    names: list[str] = []
    size = write(tmp_path / "model.safetensors", tensors, names)
    assert size == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert sorted(names) == sorted(tensors)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert torch.equal(handle.get_tensor(name), tensor)
            assert handle.get_tensor(name).dtype == tensor.dtype


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.int8)}
    write(tmp_path / "one", tensors)
    write(tmp_path / "two", dict(reversed(tensors.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_golden_bytes(tmp_path: Path) -> None:
    write(tmp_path / "file", {"x": torch.tensor([1, 2], dtype=torch.int16)})
    head = b'{"__metadata__":{"format":"pt"},"x":{"dtype":"I16","shape":[2],"data_offsets":[0,4]}}'
    head += b" " * (-len(head) % 8)
    assert (tmp_path / "file").read_bytes() == len(head).to_bytes(8, "little") + head + b"\x01\x00\x02\x00"


def test_a_file_that_was_not_finished_has_no_name(tmp_path: Path) -> None:
    def fail(name: str) -> torch.Tensor:
        raise RuntimeError(name)

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "file", {"x": (torch.float32, (1,))}, fail, [].append)
    assert not (tmp_path / "file").exists()


def test_a_tensor_that_is_not_as_announced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not the layout's"):
        write_shard(tmp_path / "file", {"x": (torch.float32, (2,))}, lambda _: torch.zeros(3), [].append)


def test_names_and_index(tmp_path: Path) -> None:
    assert shard_name(0, 1) == "model.safetensors"
    assert shard_name(1, 12) == "model-00002-of-00012.safetensors"
    write_index(tmp_path, {"one": ["b", "c"], "two": ["a"]}, 12)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 12}, "weight_map": {"a": "two", "b": "one", "c": "one"}}
