"""AWQ checkpoints, held against bytes that GPTQModel's packing of AWQ wrote."""

import pytest
import torch

from compress.core.errors import ModelError, PlanError
from compress.core.scheme import Scheme
from compress.formats.awq import Awq
from compress.formats.weight_format import Held
from tests.formats.golden_layers import COLUMNS, ROWS, layer, packed, parts, value


def held(
    group: int | None = 16, *, bits: int = 4, rows: int = ROWS, module: str = "model.layers.0.mlp.up_proj"
) -> Held:
    return Held(module, "Linear", False, rows, COLUMNS, Scheme(bits, group))


def test_the_bytes_are_those_of_awq() -> None:
    matrix, golden = layer(4, symmetric=False), packed()
    written = Awq().encode("m.weight", parts(matrix), matrix.scheme)
    assert set(written) == {"m.qweight", "m.qzeros", "m.scales"}
    for name, tensor in written.items():
        assert torch.equal(tensor, golden[f"awq.4.asymmetric.{name.removeprefix('m.')}"])
        assert tensor.dtype == golden[f"awq.4.asymmetric.{name.removeprefix('m.')}"].dtype


def test_the_bytes_of_awq_are_read() -> None:
    golden = packed()
    tensors = {local: golden[f"awq.4.asymmetric.{local}"] for local in ("qweight", "qzeros", "scales")}
    config = Awq().configuration([held()], [], {})["quantization_config"]
    read = Awq().read(tensors, "model.layers.0.mlp.up_proj", config)
    assert torch.equal(read.value().double(), value(layer(4, symmetric=False)))


def test_a_symmetric_layer_has_the_middle_for_a_zero_point() -> None:
    matrix = layer(4, symmetric=True)
    written = Awq().encode("m.weight", parts(matrix), matrix.scheme)
    assert bool((written["m.qzeros"] == torch.tensor(0x88888888 - (1 << 32), dtype=torch.int32)).all())
    config = Awq().configuration([held()], [], {})["quantization_config"]
    tensors = {name.removeprefix("m."): tensor for name, tensor in written.items()}
    assert torch.equal(Awq().read(tensors, "m", config).value().double(), value(matrix))


def test_the_layout_is_what_is_written() -> None:
    matrix = layer(4, symmetric=False)
    written = Awq().encode("m.weight", parts(matrix), matrix.scheme)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in written.items()} == {
        f"m.{local}": entry for local, entry in Awq().layout(held()).items()
    }


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (Held("m", "Embedding", False, 32, 32, Scheme(4, 32)), "cannot hold a Embedding"),
        (held(bits=8), "4 bits, not 8"),
        (held(8), "not of 8"),
        (held(rows=12), "12 outputs"),
        (held(module="lm_head"), "head in floats"),
    ],
)
def test_what_cannot_be_held(entry: Held, reason: str) -> None:
    assert reason in (Awq().refusal(entry) or "")


def test_one_group_size_for_all() -> None:
    mixed = [held(16), Held("n", "Linear", False, 32, 32, Scheme(4, 16, False))]
    assert Awq().refusal_together(mixed) is None, "every layer has zero points"
    assert "one scheme for all layers" in (Awq().refusal_together([held(16), held(32)]) or "")


def test_scales_that_float16_does_not_hold() -> None:
    matrix = layer(4, symmetric=True)
    matrix.scale[0, 0] = 1e-9
    for form in (Awq(), Awq("round")):
        with pytest.raises(PlanError, match=r"m: scale 1e-09 is out of float16's range"):
            form.encode("m.weight", parts(matrix), matrix.scheme)


def test_the_configuration_names_what_stays_in_floats() -> None:
    config = Awq().configuration([held(None)], ["model.layers.1.mlp.gate"], {"hidden_size": 32})
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": -1,
        "zero_point": True,
        "modules_to_not_convert": ["model.layers.1.mlp.gate"],
    }
    golden = packed()
    tensors = {local: golden[f"awq.4.asymmetric.{local}"] for local in ("qweight", "qzeros", "scales")}
    with pytest.raises(ModelError, match="groups of 32"):
        Awq().read(tensors, "m", config["quantization_config"])
