"""The compressed-tensors writer: golden words, and the library's own decompression."""

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

from compress.core.errors import ModelError
from compress.core.scheme import FLOAT_LAYOUTS, Activations, Format, Scheme
from compress.formats.compressed_tensors import (
    INPUT_SCALE,
    CompressedTensors,
    UnknownStorage,
    float_scheme_of,
    holds_floats,
    packing_of,
    quantizes_inputs,
    read_floats,
    read_matrix,
    read_quantized,
    scheme_of,
)
from compress.formats.weight_format import Held
from compress.numerics.affine import Quantized, round_to_nearest
from compress.numerics.floats import round_to_floats


def held(module: str, scheme: Scheme, *, kind: str = "Linear", expert: bool = False) -> Held:
    return Held(module, kind, expert, 32, 64, scheme)


def random_quantized(scheme: Scheme, rows: int = 32, columns: int = 64) -> Quantized:
    generator = torch.Generator().manual_seed(0)
    bounds = (scheme.lowest, scheme.highest + 1)
    q = torch.randint(*bounds, (rows, columns), generator=generator).to(torch.int8)
    groups = scheme.groups(columns)
    scale = torch.rand(rows, groups, generator=generator) + 0.1
    zero = None
    if not scheme.symmetric:
        zero = torch.randint(*bounds, (rows, groups), generator=generator).to(torch.int8)
    return Quantized(q, scale, zero, scheme)


def parts(quantized: Quantized) -> dict[str, torch.Tensor]:
    found = {"q": quantized.q, "scale": quantized.scale}
    return found if quantized.zero is None else {**found, "zero": quantized.zero}


def test_golden_words_of_four_bits() -> None:
    """Eight values in one word, the first in the lowest four bits, each plus eight."""
    q = torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7]], dtype=torch.int8)
    tensors = CompressedTensors().encode("a.weight", {"q": q, "scale": torch.ones(1, 1)}, Scheme(4, None))
    assert sorted(tensors) == ["a.weight_packed", "a.weight_scale", "a.weight_shape"]
    # Nibbles from the lowest: 0, 1, 7, 8, 9, a, e, f.
    assert tensors["a.weight_packed"].tolist() == [[0xFEA98710 - 2**32]]
    assert tensors["a.weight_shape"].tolist() == [1, 8]


def test_golden_words_of_three_bits_cross_the_word_boundary() -> None:
    """Element i lies at bit 3 i of a stream of little-endian words: 32 values fill exactly three words."""
    values = [(index * 5) % 8 - 4 for index in range(32)]
    stream = sum((value + 4) << (3 * index) for index, value in enumerate(values))
    words = [(stream >> (32 * index)) & 0xFFFFFFFF for index in range(3)]
    expected = [word - 2**32 if word >= 2**31 else word for word in words]
    q = torch.tensor([values], dtype=torch.int8)
    tensors = CompressedTensors().encode("a.weight", {"q": q, "scale": torch.ones(1, 1)}, Scheme(3, None))
    assert tensors["a.weight_packed"].tolist() == [expected]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_library_reads_what_was_meant_to_the_bit(bits: int, group: int | None, symmetric: bool) -> None:
    scheme = Scheme(bits, group, symmetric)
    quantized = random_quantized(scheme)
    tensors = CompressedTensors().encode("m.weight", parts(quantized), scheme)
    config = CompressedTensors().configuration([held("m", scheme)], [], {})["quantization_config"]
    parsed = QuantizationConfig.model_validate(config).config_groups["group_0"]
    local = {name.removeprefix("m."): tensor for name, tensor in tensors.items()}
    library: Any = BaseCompressor.get_value_from_registry(config["format"])
    weight = library.decompress(local, parsed)["weight"]
    assert torch.equal(weight, quantized.dequantize())
    back = read_quantized(local, scheme)
    assert torch.equal(back.q, quantized.q)
    assert torch.equal(back.dequantize(), weight)


def test_the_predicted_bytes_are_the_written_bytes() -> None:
    for scheme in (Scheme(3, 32), Scheme(4, None, False), Scheme(8, 16), Scheme(2, 64, False)):
        tensors = CompressedTensors().encode("m.weight", parts(random_quantized(scheme)), scheme)
        written = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert CompressedTensors().encoded_bytes(held("m", scheme), 4) == written


def test_a_weight_with_another_name_has_no_name_in_the_format() -> None:
    with pytest.raises(ModelError, match=r"does not end in '\.weight'"):
        CompressedTensors().encode("experts.gate_up_proj", {}, Scheme(4, 32))


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(ModelError, match="weight_packed"):
        read_quantized({}, Scheme(4, 32))


def test_what_cannot_be_held_is_refused() -> None:
    scheme = Scheme(4, 32)
    writer = CompressedTensors()
    assert writer.refusal(held("a", scheme)) is None
    assert "Conv1D" in (writer.refusal(held("a", scheme, kind="Conv1D")) or "")
    assert "zero points" in (writer.refusal(held("a", Scheme(4, 32, False), expert=True)) or "")
    assert writer.refusal_together([held("a", scheme), held("b", Scheme(8, 32))]) is None
    assert writer.refusal_together([held("a", Scheme(4, 32, False)), held("b", scheme)]) is not None
    experts = [held("a", scheme, expert=True), held("b", Scheme(8, 32), expert=True)]
    assert writer.refusal_together(experts) is not None


def test_the_configuration_names_each_scheme_once() -> None:
    entries = [held("x.a", Scheme(4, 32)), held("x.b", Scheme(4, 32)), held("x.c", Scheme(8, None))]
    config = CompressedTensors().configuration(entries, ["lm_head"], {"model_type": "llama"})
    quantization = config["quantization_config"]
    assert config["model_type"] == "llama"
    assert quantization["ignore"] == ["lm_head"]
    assert quantization["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert quantization["config_groups"]["group_1"]["targets"] == [r"re:^(x\.c)$"]
    assert quantization["config_groups"]["group_1"]["weights"]["strategy"] == "channel"
    assert "dequantize" not in quantization
    QuantizationConfig.model_validate(quantization)


PRESETS: list[tuple[str, Format, Activations]] = [
    ("W8A8", "int", "dynamic"),
    ("FP8_DYNAMIC", "fp8", "dynamic"),
    ("NVFP4A16", "nvfp4", "none"),
    ("NVFP4", "nvfp4", "static"),
    ("MXFP4A16", "mxfp4", "none"),
    ("MXFP4", "mxfp4", "dynamic"),
]
SMALL = [
    *PRESETS,
    ("W8A8, fixed", "int", "static"),
    ("FP8, fixed", "fp8", "static"),
    ("FP8A16", "fp8", "none"),
]


def small_scheme(name: Format, activations: Activations) -> Scheme:
    bits, group = FLOAT_LAYOUTS.get(name, (8, None))
    return Scheme(bits, group, range="narrow", format=name, activations=activations)


def small_matrix(scheme: Scheme, storage: torch.dtype = torch.bfloat16) -> Any:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).to(storage).float()
    if scheme.integers:
        return round_to_nearest(weight, scheme, storage)
    return round_to_floats(weight, scheme, storage)


def small_tensors(scheme: Scheme) -> tuple[Any, dict[str, torch.Tensor]]:
    """A matrix, and what is written of it by local names."""
    matrix = small_matrix(scheme)
    found = matrix.parts()
    if scheme.activations == "static":
        dtype = torch.float32 if scheme.format == "nvfp4" else torch.bfloat16
        found[INPUT_SCALE] = torch.full((32,), 0.25, dtype=dtype)
    tensors = CompressedTensors().encode("m.weight", found, matrix.scheme)
    return matrix, {name.removeprefix("m."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(("preset", "name", "activations"), PRESETS)
def test_arguments_are_those_of_the_librarys_presets(
    preset: str, name: Format, activations: Activations
) -> None:
    scheme = small_scheme(name, activations)
    config = CompressedTensors().configuration([held("m", scheme)], [], {})["quantization_config"]
    ours = QuantizationConfig.model_validate(config).config_groups["group_0"]
    theirs = preset_name_to_scheme(preset, ["Linear"])
    for part in ("weights", "input_activations"):
        # What the library's own calibration would gather, and a type of zero points that there are none of,
        # are no matter of a reader.
        given, wanted = (
            None if found is None else found.model_dump(exclude={"observer", "zp_dtype"})
            for found in (getattr(ours, part), getattr(theirs, part))
        )
        assert given == wanted
    assert config["format"] == infer_module_format(torch.nn.Linear, theirs).value


@pytest.mark.parametrize(("_", "name", "activations"), SMALL)
def test_small_numbers_are_read_by_the_library_as_they_were_meant(
    _: str, name: Format, activations: Activations
) -> None:
    scheme = small_scheme(name, activations)
    matrix, local = small_tensors(scheme)
    config = CompressedTensors().configuration([held("m", scheme)], [], {})["quantization_config"]
    parsed = QuantizationConfig.model_validate(config).config_groups["group_0"]
    assert not isinstance(parsed, list)
    assert config["format"] == packing_of(scheme) == infer_module_format(torch.nn.Linear, parsed).value
    library: Any = BaseCompressor.get_value_from_registry(config["format"])
    assert set(library.compression_param_names(parsed)) <= {*local, "input_global_scale"}
    assert torch.equal(library.decompress(local, parsed)["weight"], matrix.dequantize())
    assert sum(t.numel() * t.element_size() for t in local.values()) == CompressedTensors().encoded_bytes(
        held("m", scheme), 2
    )
    assert quantizes_inputs(config) == (activations != "none")
    assert holds_floats(config) == (name != "int")


@pytest.mark.parametrize(("_", "name", "activations"), SMALL)
def test_the_library_writes_the_same_bytes(_: str, name: Format, activations: Activations) -> None:
    scheme = small_scheme(name, activations)
    matrix, local = small_tensors(scheme)
    config = CompressedTensors().configuration([held("m", scheme)], [], {})["quantization_config"]
    parsed = QuantizationConfig.model_validate(config).config_groups["group_0"]
    library: Any = BaseCompressor.get_value_from_registry(config["format"])
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).float()
    scale = local["weight_scale"]
    given = {
        "weight": weight,
        "weight_scale": (2.0 ** (scale.float() - 127)) if name == "mxfp4" else scale.float(),
    }
    if name == "nvfp4":
        given["weight_global_scale"] = local["weight_global_scale"]
    written = library.compress(given, parsed)
    numbers = "weight" if "weight" in local else "weight_packed"
    assert torch.equal(written[numbers].view(torch.uint8), local[numbers].view(torch.uint8))
    assert torch.equal(written["weight_scale"].to(scale.dtype).float(), scale.float())


@pytest.mark.parametrize(("_", "name", "activations"), SMALL)
def test_small_numbers_are_read_back(_: str, name: Format, activations: Activations) -> None:
    scheme = small_scheme(name, activations)
    matrix, local = small_tensors(scheme)
    if name == "int":
        assert scheme_of(local, "m") == (Scheme(8, None), (32, 64))
        assert torch.equal(read_matrix(local, "m").dequantize(), matrix.dequantize())
        with pytest.raises(UnknownStorage, match="not stored as small floats"):
            float_scheme_of(local, "m")
        return
    found, shape = float_scheme_of(local, "m")
    assert (found.format, shape) == (name, (32, 64))
    assert found.activations == ("static" if activations == "static" else "none")
    assert torch.equal(read_floats(local, "m", torch.bfloat16).dequantize(), matrix.dequantize())
    with pytest.raises(UnknownStorage, match=f"stored as {name} numbers"):
        read_matrix(local, "m")
    with pytest.raises(ModelError, match="do not belong to"):
        float_scheme_of({**local, "weight_scale": local["weight_scale"][:5]}, "m")


def test_golden_bytes_of_four_bit_floats() -> None:
    """Two numbers a byte, the first in the low half; the sign is the highest bit of a half."""
    values = torch.tensor(
        [[0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0, 6.0]]
    )
    matrix = round_to_floats(values, Scheme(4, 16, format="nvfp4", tensor_scale=1.0), torch.bfloat16)
    tensors = CompressedTensors().encode("m.weight", matrix.parts(), matrix.scheme)
    # Codes in order: 0 1, 2 3, 4 5, 6 7, 9 a, b c, d e, f 7.
    assert bytes(tensors["m.weight_packed"][0].tolist()).hex() == "10325476a9cbed7f"
    assert tensors["m.weight_scale"].view(torch.uint8).tolist() == [[0x38]]  # 1.0 as E4M3
    assert tensors["m.weight_global_scale"].tolist() == [1.0]


def test_small_numbers_are_refused_where_no_loader_would_use_them() -> None:
    writer = CompressedTensors()
    for name, activations in (("fp8", "none"), ("int", "dynamic")):
        scheme = small_scheme(name, activations)  # type: ignore[arg-type]
        assert writer.refusal(held("a", scheme)) is None
        assert "experts" in (writer.refusal(held("a", scheme, expert=True)) or "")
        assert "looked up" in (writer.refusal(held("a", scheme, kind="Embedding")) or "")


def test_layouts_that_differ_are_named_group_by_group() -> None:
    entries = [held("x.a", small_scheme("fp8", "dynamic")), held("x.b", Scheme(4, 32))]
    quantization = CompressedTensors().configuration(entries, [], {})["quantization_config"]
    assert quantization["format"] == "mixed-precision"
    formats = [group["format"] for group in quantization["config_groups"].values()]
    assert formats == ["float-quantized", "pack-quantized"]
    QuantizationConfig.model_validate(quantization)
