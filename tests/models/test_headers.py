"""Every byte of a safetensors file is accounted for: damage of any kind is an error that names the file."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from compress.core.errors import ModelError
from compress.models.headers import INDEX_FILE, SINGLE_FILE, read_header, read_model

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.ones(4, dtype=np.float16),
    "c": np.zeros((0, 5), dtype=np.int64),
    "d": np.array(3, dtype=np.uint8),
}


def raw(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_sound_file_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    file = tmp_path / SINGLE_FILE
    save_file(ARRAYS, file, metadata={"format": "pt"})
    found = {tensor.name: tensor for tensor in read_header(file)}
    assert found.keys() == ARRAYS.keys()
    data = file.read_bytes()
    for name, array in ARRAYS.items():
        assert found[name].shape == array.shape
        assert data[found[name].start : found[name].end] == array.tobytes()
    with safe_open(file, framework="np") as opened:
        assert {name: opened.get_slice(name).get_dtype() for name in ARRAYS} == {
            name: tensor.dtype for name, tensor in found.items()
        }


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "truncated or no safetensors"),
        (b"\1\2\3", "truncated or no safetensors"),
        (struct.pack("<Q", 1000) + b"{}", "truncated or no safetensors"),
        (struct.pack("<Q", 2**63) + b"{}", "truncated or no safetensors"),
        (raw(b"{]", b""), "damaged header"),
        (raw(b"\xff{}", b""), "damaged header"),
        (raw(b"[]", b""), "no object"),
        (raw(b'{"a": 1, "a": 2}', b""), "a name comes twice"),
        (raw({"__metadata__": {"a": 1}}, b""), "__metadata__"),
        (raw({"a": 1}, b""), "not described"),
        (raw({"a": {**entry(), "more": 1}}, b"\0" * 8), "not described"),
        (raw({"a": entry(dtype="F31")}, b"\0" * 8), "unknown dtype 'F31'"),
        (raw({"a": entry(shape=[-2])}, b"\0" * 8), r"shape \[-2\]"),
        (raw({"a": entry(shape=[True, 2])}, b"\0" * 8), "shape"),
        (raw({"a": entry(offsets=[8, 0])}, b"\0" * 8), "-8 bytes for F32"),
        (raw({"a": entry(offsets=[0])}, b"\0" * 8), "data_offsets"),
        (raw({"a": entry(shape=[3])}, b"\0" * 8), r"8 bytes for F32 \[3\]"),
        (raw({"a": entry(dtype="F4", shape=[3], offsets=[0, 1])}, b"\0"), "1 bytes for F4"),
        (raw({"a": entry()}, b"\0" * 7), "is truncated: .* bytes, expected"),
        (raw({"a": entry()}, b"\0" * 9), "bytes that belong to no tensor"),
        (raw({}, b"\0"), "bytes that belong to no tensor"),
        (raw({"a": entry(offsets=[8, 16])}, b"\0" * 16), "hole before tensor 'a'"),
        (raw({"a": entry(), "b": entry(offsets=[16, 24])}, b"\0" * 24), "'a' and 'b' have a hole"),
        (raw({"a": entry(), "b": entry(offsets=[4, 12])}, b"\0" * 12), "'a' and 'b' overlap"),
        (raw({"a": entry(), "b": entry()}, b"\0" * 8), "overlap"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    file = tmp_path / SINGLE_FILE
    file.write_bytes(content)
    with pytest.raises(ModelError, match=complaint) as caught:
        read_header(file)
    assert SINGLE_FILE in caught.value.message


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(position=st.integers(min_value=0), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_header_never_moves_a_byte_of_a_weight(
    tmp_path: Path, position: int, bit: int
) -> None:
    """It is refused, or what can still be read (another name, dtype of the same width) covers the file."""
    file = tmp_path / SINGLE_FILE
    save_file(ARRAYS, file)
    data = bytearray(file.read_bytes())
    at = position % (8 + int.from_bytes(data[:8], "little"))
    data[at] ^= 1 << bit
    file.write_bytes(bytes(data))
    try:
        found = read_header(file)
    except ModelError:
        return
    assert sum(tensor.end - tensor.start for tensor in found) == sum(a.nbytes for a in ARRAYS.values())


@given(size=st.integers(min_value=0))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_any_truncation_is_refused(tmp_path: Path, size: int) -> None:
    file = tmp_path / SINGLE_FILE
    save_file(ARRAYS, file)
    data = file.read_bytes()
    file.write_bytes(data[: size % len(data)])
    with pytest.raises(ModelError):
        read_header(file)


def sharded(folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
    save_file({"a": ARRAYS["a"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": ARRAYS["b"]}, folder / "model-00002-of-00002.safetensors")
    index: dict[str, Any] = {
        "metadata": {},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    change(index)
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return folder


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    assert read_model(sharded(tmp_path)).keys() == {"a", "b"}


def weights(**entries: str | None) -> Callable[[dict[str, Any]], None]:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"].update(entries)
        for name in [name for name, value in entries.items() if value is None]:
            del index["weight_map"][name]

    return change


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    cases: Mapping[str, Callable[[dict[str, Any]], None]] = {
        "names model-3.safetensors, which is missing": weights(c="model-3.safetensors"),
        f"names tensor 'c' in {first}, which does not hold it": weights(c=first),
        f"names tensor 'a' in {second}, it is in {first}": weights(a=second, b=first),
        f"does not name tensor 'a' of {first}": lambda index: weights(a=None, b=first)(index),
        "expected a safetensors file in the same folder": weights(a="pytorch_model.bin"),
        "expected a safetensors file in the": weights(a="../elsewhere.safetensors"),
        "holds no weight_map": lambda index: index.pop("weight_map") and None,
    }
    for at, (complaint, change) in enumerate(cases.items()):
        folder = tmp_path / str(at)
        folder.mkdir()
        sharded(folder, change)
        if "does not name" in complaint:
            change = weights(a=None)
            save_file({"a": ARRAYS["a"], "z": ARRAYS["b"]}, folder / first)
            sharded_index = {"weight_map": {"z": first, "b": second}}
            (folder / INDEX_FILE).write_text(json.dumps(sharded_index))
        with pytest.raises(ModelError, match=complaint):
            read_model(folder)
    (folder / INDEX_FILE).write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        read_model(folder)


def test_stray_and_doubled_weights_are_refused(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / SINGLE_FILE)
    save_file(ARRAYS, tmp_path / "consolidated.safetensors")
    with pytest.raises(ModelError, match=r"consolidated.safetensors belongs to no model"):
        read_model(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    sharded(other)
    save_file({"a": ARRAYS["a"], "b": ARRAYS["b"]}, other / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelError, match="tensor 'a' is in both"):
        read_model(other)


def test_folders_without_a_whole_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"neither {SINGLE_FILE} nor"):
        read_model(tmp_path)
    save_file(ARRAYS, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="adapter"):
        read_model(tmp_path)
