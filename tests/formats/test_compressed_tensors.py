"""The compressed-tensors writer: golden words, and the library's own decompression."""

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig

from compress.core.errors import ModelError
from compress.core.scheme import Scheme
from compress.formats.compressed_tensors import CompressedTensors, read_quantized
from compress.formats.weight_format import Held
from compress.numerics.affine import Quantized


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
