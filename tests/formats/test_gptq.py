"""GPTQ checkpoints, held against bytes that GPTQModel wrote."""

import pytest
import torch

from compress.core.errors import CompressError, ModelError, PlanError
from compress.core.scheme import Scheme
from compress.formats.gptq import Gptq, Version, read_matrix, scheme_of
from compress.formats.weight_format import Held
from tests.formats.golden_layers import COLUMNS, ROWS, layer, packed, parts, value

LAYOUT = ("qweight", "qzeros", "scales", "g_idx")


def held(bits: int, group: int | None = 16, *, rows: int = ROWS, columns: int = COLUMNS) -> Held:
    return Held("model.layers.0.mlp.up_proj", "Linear", False, rows, columns, Scheme(bits, group))


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_bytes_are_those_of_gptqmodel(bits: int, symmetric: bool, version: Version) -> None:
    matrix = layer(bits, symmetric=symmetric)
    written = Gptq(version).encode("m.weight", parts(matrix), matrix.scheme)
    golden = packed()
    key = f"gptq.{bits}.{'symmetric' if symmetric else 'asymmetric'}"
    assert torch.equal(written["m.qweight"], golden[f"{key}.qweight"])
    assert torch.equal(written["m.qzeros"], golden[f"{key}.qzeros_{version}"])
    assert torch.equal(written["m.scales"], golden[f"{key}.scales"])
    assert torch.equal(written["m.g_idx"], golden[f"{key}.g_idx"])


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_bytes_of_gptqmodel_are_read(bits: int, symmetric: bool, version: Version) -> None:
    golden, form = packed(), Gptq(version)
    key = f"gptq.{bits}.{'symmetric' if symmetric else 'asymmetric'}"
    names = {"qzeros": f"qzeros_{version}"}
    tensors = {local: golden[f"{key}.{names.get(local, local)}"] for local in LAYOUT}
    config = form.configuration([held(bits)], [], {})["quantization_config"]
    read = form.read(tensors, "model.layers.0.mlp.up_proj", config)
    assert torch.equal(read.value().double(), value(layer(bits, symmetric=symmetric)))


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_integers_of_gptqmodel_come_out_as_they_went_in(
    bits: int, symmetric: bool, version: Version
) -> None:
    matrix = layer(bits, symmetric=symmetric)
    config = {"quant_method": "gptq", "bits": bits, "group_size": 16, "sym": symmetric, "desc_act": True}
    # What older tools wrote names no version.
    config |= {"checkpoint_format": "gptq_v2"} if version == "v2" else {}
    read = read_matrix(golden_tensors(bits, symmetric, version), "m", config)
    assert torch.equal(read.q, matrix.q)
    assert torch.equal(read.scale, matrix.scale.half())
    assert read.scheme == matrix.scheme
    if matrix.zero is None:
        assert read.zero is None
    else:
        assert torch.equal(read.zero, matrix.zero)


def golden_tensors(bits: int, symmetric: bool, version: Version) -> dict[str, torch.Tensor]:
    key = f"gptq.{bits}.{'symmetric' if symmetric else 'asymmetric'}"
    names = {"qzeros": f"qzeros_{version}"}
    return {local: packed()[f"{key}.{names.get(local, local)}"] for local in LAYOUT}


def test_whole_rows_and_a_missing_index_are_read() -> None:
    q = torch.randint(-8, 8, (32, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    scale = torch.linspace(-1, 1, 32).half().unsqueeze(1)
    written = Gptq("v1").encode("m.weight", {"q": q, "scale": scale}, Scheme(4, None))
    tensors = {name.removeprefix("m."): tensor for name, tensor in written.items()}
    del tensors["g_idx"]
    config = {"bits": 4, "group_size": -1, "dynamic": {"m": {"sym": True}, "-:^n$": {}}, "sym": False}
    read = read_matrix(tensors, "m", config)
    assert read.scheme == Scheme(4, None)
    assert torch.equal(read.q, q)
    assert torch.equal(read.scale, scale)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"bits": 8}, ModelError, "m: its tensors are not those of 8 bits in 1 groups: qzeros"),
        ({"bits": 5}, ModelError, "2, 3, 4 or 8 bits, and this one says 5"),
        ({"bits": None}, ModelError, "bits None, expected a whole number"),
        ({"group_size": 24}, ModelError, "groups of 24 do not divide 32 inputs"),
        ({"checkpoint_format": "marlin"}, PlanError, "packed as 'marlin', expected gptq or gptq_v2"),
        ({"pack_dtype": "int8"}, PlanError, "packed in int8"),
        ({"sym": True}, ModelError, "symmetric, and a group has the zero point"),
        ({"dynamic": {"-:m": {}}}, ModelError, "the configuration says that it is not"),
    ],
)
def test_checkpoints_that_contradict_themselves_are_refused(
    change: dict[str, object], kind: type[CompressError], said: str
) -> None:
    config = {"bits": 4, "group_size": 16, "sym": False, "checkpoint_format": "gptq_v2", **change}
    with pytest.raises(kind, match=said) as caught:
        read_matrix(golden_tensors(4, False, "v2"), "m", config)
    assert caught.value.message


def test_an_activation_order_is_refused_from_the_index_alone() -> None:
    tensors = golden_tensors(4, True, "v2")
    index = tensors["g_idx"].clone()
    index[[3, 20]] = index[[20, 3]]
    headers = {name: tensor.to("meta") for name, tensor in tensors.items()} | {"g_idx": index}
    config = {"bits": 4, "group_size": 16, "desc_act": True}
    with pytest.raises(
        PlanError, match=r"m: its inputs are grouped in the order of their activations"
    ) as caught:
        scheme_of(headers, "m", config)
    assert "quantize.gptq" in caught.value.hint
    assert scheme_of(headers | {"g_idx": tensors["g_idx"]}, "m", config) == (Scheme(4, 16), (ROWS, COLUMNS))


def test_a_zero_point_that_readers_of_version_1_dispute_is_refused() -> None:
    tensors = golden_tensors(4, False, "v1")
    tensors["qzeros"] = tensors["qzeros"].clone()
    tensors["qzeros"][0, 0] |= 15
    with pytest.raises(PlanError, match="some readers take for 16 and others for 0"):
        read_matrix(tensors, "m", {"bits": 4, "group_size": 16, "sym": False})


@pytest.mark.parametrize(("bits", "group"), [(2, None), (3, 32), (4, 16), (8, None)])
def test_the_layout_is_what_is_written(bits: int, group: int | None) -> None:
    q = torch.zeros(64, 96, dtype=torch.int8)
    scheme = Scheme(bits, group)
    written = Gptq().encode("m.weight", {"q": q, "scale": torch.ones(64, scheme.groups(96))}, scheme)
    layout = Gptq().layout(held(bits, group, rows=64, columns=96))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in written.items()} == {
        f"m.{local}": entry for local, entry in layout.items()
    }
    size = sum(tensor.nbytes for tensor in written.values())
    assert Gptq().encoded_bytes(held(bits, group, rows=64, columns=96), 4) == size


def test_version_1_refuses_what_it_has_no_word_for() -> None:
    matrix = layer(4, symmetric=False)
    assert matrix.zero is not None
    matrix.zero[3, 1] = -8
    with pytest.raises(PlanError, match=r"m: a group has the zero point 0") as caught:
        Gptq("v1").encode("m.weight", parts(matrix), matrix.scheme)
    assert "gptq_v2" in caught.value.hint
    assert Gptq("v2").encode("m.weight", parts(matrix), matrix.scheme)


def test_scales_that_float16_does_not_hold() -> None:
    matrix = layer(4, symmetric=True)
    matrix.scale[5, 1] = 1 / 3
    with pytest.raises(
        PlanError, match=r"m: 1 of 64 are not exact in float16, first scale 0\.3333"
    ) as caught:
        Gptq().encode("m.weight", parts(matrix), matrix.scheme)
    assert "--inexact round" in caught.value.hint
    written = Gptq(inexact="round").encode("m.weight", parts(matrix), matrix.scheme)
    assert written["m.scales"][1, 5] == torch.tensor(1 / 3).half()


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (Held("m", "Embedding", False, 32, 32, Scheme(4, 32)), "cannot hold a Embedding"),
        (held(5), "not 5"),
        (held(4, 8), "not of 8"),
        (held(4, 32, rows=36), "36 outputs of 4 bits"),
        (held(3, 16, columns=48), "48 inputs of 3 bits"),
    ],
)
def test_what_cannot_be_held(entry: Held, reason: str) -> None:
    assert reason in (Gptq().refusal(entry) or "")


def test_experts_are_held() -> None:
    assert Gptq().refusal(Held("m.experts.0.up_proj", "expert", True, 32, 32, Scheme(4, 32))) is None


def test_the_configuration_speaks_of_what_differs() -> None:
    common = [held(4, 32), Held("model.layers.1.mlp.up_proj", "Linear", False, 32, 32, Scheme(4, 32))]
    other = Held("model.layers.10.mlp.up_proj", "Linear", False, 32, 32, Scheme(8, None, False))
    config = Gptq("v2").configuration([*common, other], ["model.layers.1.mlp.gate"], {"hidden_size": 32})
    assert config["hidden_size"] == 32
    quantization = config["quantization_config"]
    assert quantization["checkpoint_format"] == "gptq_v2"
    assert (quantization["bits"], quantization["group_size"], quantization["sym"]) == (4, 32, True)
    assert quantization["desc_act"] is False
    assert list(quantization["dynamic"].items()) == [
        (r"-:^model\.layers\.1\.mlp\.gate$", {}),
        (r"+:^model\.layers\.10\.mlp\.up_proj$", {"bits": 8, "group_size": -1, "sym": False}),
    ]
    assert len(quantization["modules_in_block_to_quantize"][0]) == 3


def test_tensors_that_the_configuration_contradicts_are_refused() -> None:
    golden, form = packed(), Gptq("v2")
    tensors = {"qzeros": golden["gptq.4.symmetric.qzeros_v2"]} | {
        local: golden[f"gptq.4.symmetric.{local}"] for local in ("qweight", "scales", "g_idx")
    }
    config = form.configuration([held(8)], [], {})["quantization_config"]
    with pytest.raises(ModelError, match="not those of 8 bits"):
        form.read(tensors, "m", config)
    kept = form.configuration([held(4)], ["m"], {})["quantization_config"]
    with pytest.raises(ModelError, match="the configuration says that it is not"):
        form.read(tensors, "m", kept)
