"""NaN, infinity and values out of all proportion are found in every float type, by their place."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compress.core.errors import ModelError
from compress.models import scan as scanning
from compress.models.headers import read_header
from compress.models.scan import remember, remembered, scan

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn]
# Infinity is not in every type: where it is not, a conversion gives the largest number instead.
NOT_FINITE = [
    (dtype, value)
    for dtype in FLOATS
    for value in (float("nan"), float("inf"), float("-inf"))
    if not torch.tensor(value).to(dtype).float().isfinite()
]


def warnings_of(tensor: torch.Tensor, folder: Path) -> list[str]:
    file = folder / "model.safetensors"
    save_file({"before": torch.ones(3), "weight": tensor.contiguous()}, file)
    return [warning for _, warning in scan(read_header(file)) if warning]


@pytest.mark.parametrize(("dtype", "value"), NOT_FINITE)
@pytest.mark.parametrize("place", [(0, 0), (17, 301), (63, 511)])
def test_one_value_that_is_not_finite_is_found_at_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, value: float, place: tuple[int, int]
) -> None:
    monkeypatch.setattr(scanning, "CHUNK_BYTES", 4096)
    tensor = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert warnings_of(tensor, tmp_path) == []
    kept = tensor.float()
    kept[place] = value
    tensor = kept.to(dtype)
    word = "an infinity" if tensor.float()[place].isinf() else "a NaN"
    with pytest.raises(ModelError, match=rf"'weight' holds {word} at \[{place[0]}, {place[1]}\]"):
        warnings_of(tensor, tmp_path)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_finite_number_is_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    warnings_of(torch.full((4,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype), tmp_path)


@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_are_read_as_the_numbers_that_they_stand_for(dtype: torch.dtype) -> None:
    name = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float8_e5m2: "F8_E5M2",
        torch.float8_e4m3fn: "F8_E4M3",
    }[dtype]
    layout = scanning._LAYOUTS[name]
    numbers = torch.randn(200, generator=torch.Generator().manual_seed(1)).to(dtype)
    numbers[0] = torch.finfo(dtype).smallest_normal
    numbers[1] = 0
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[dtype.itemsize]
    for number in numbers:
        bits = int(number.view(integer)) & layout.magnitude
        assert layout.value(bits) == abs(number.double().item())


def test_a_flipped_high_bit_of_an_exponent_is_suspicious(tmp_path: Path) -> None:
    tensor = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).mul(0.02).to(torch.bfloat16)
    assert warnings_of(tensor, tmp_path) == []
    tensor.view(torch.int16)[5, 7] ^= 1 << 14
    (warning,) = warnings_of(tensor, tmp_path)
    assert warning.startswith("weight[5, 7] of model.safetensors is ")
    assert "damaged bit?" in warning


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (1,), (7,), (4097,), (300_000,)])
def test_every_shape_is_looked_at(tmp_path: Path, shape: tuple[int, ...]) -> None:
    assert warnings_of(torch.ones(shape), tmp_path) == []
    if shape and 0 not in shape:
        tensor = torch.ones(shape)
        tensor.view(-1)[-1] = float("nan")
        with pytest.raises(ModelError, match=rf"NaN at \[{shape[0] - 1}\]"):
            warnings_of(tensor, tmp_path)


def test_zeros_and_integers_are_no_reason_to_worry(tmp_path: Path) -> None:
    sparse = torch.zeros(100_000)
    sparse[5] = 1.0
    assert warnings_of(sparse, tmp_path) == []
    assert warnings_of(torch.full((5000,), 2**31 - 1, dtype=torch.int32), tmp_path) == []


def test_a_scalar_that_is_not_finite_is_found(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'weight' holds a NaN at \[\]"):
        warnings_of(torch.tensor(float("nan")), tmp_path)


def test_finite_bytes_are_remembered_by_their_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COMPRESS_DIGEST_CACHE", "on")
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3)}, file)
    assert remembered(file) is None
    remember(file, ["odd"])
    assert remembered(file) == ["odd"]
    copy = tmp_path / "b.safetensors"
    copy.write_bytes(file.read_bytes())
    assert remembered(copy) == ["odd"]
    save_file({"a": torch.zeros(3)}, file)
    assert remembered(file) is None
    monkeypatch.setenv("COMPRESS_DIGEST_CACHE", "off")
    assert remembered(copy) is None
