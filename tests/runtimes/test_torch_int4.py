"""The packed kernels against the dense product, and the reader against the library's own files."""

from pathlib import Path

import pytest
import torch

from compress import engine
from compress.core.artifact import Artifact
from compress.core.scheme import Scheme
from compress.models.tasks import resolve
from compress.numerics.affine import Quantized
from compress.runtimes import Placement, Session, Unavailable, find
from compress.runtimes._packed import check_product, obstacle, pack
from tests import models_zoo, quantized_models

CPU = torch.device("cpu")


def matrix(bits: int, group: int | None, symmetric: bool, rows: int, columns: int) -> Quantized:
    generator = torch.Generator().manual_seed(bits)
    scheme = Scheme(bits, group, symmetric)
    bounds = (scheme.lowest, scheme.highest + 1)
    q = torch.randint(*bounds, (rows, columns), generator=generator).to(torch.int8)
    scale = torch.rand(rows, scheme.groups(columns), generator=generator) * 0.1 + 0.01
    # Powers of two are the same in bfloat16, so that what differs is the kernel alone.
    scale = torch.exp2(torch.round(torch.log2(scale)))
    zero = None
    if not symmetric:
        zero = torch.randint(*bounds, tuple(scale.shape), generator=generator).to(torch.int8)
    return Quantized(q, scale, zero, scheme)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group", "rows", "columns"),
    [
        (2, 32, 16, 32),
        (3, 64, 48, 128),
        (4, 32, 40, 96),
        (4, 128, 33, 256),
        (4, 256, 16, 256),
        (4, 512, 16, 512),
        (4, None, 32, 96),
        (8, None, 33, 64),
        (5, None, 8, 48),
    ],
)
def test_kernels_compute_the_dense_product(
    bits: int, group: int | None, rows: int, columns: int, symmetric: bool
) -> None:
    quantized = matrix(bits, group, symmetric, rows, columns)
    assert obstacle(quantized, CPU) is None
    bias = torch.randn(rows)
    layer = pack(quantized, bias, CPU, torch.float32)
    check_product(layer, quantized, CPU)
    for shape in ((columns,), (1, columns), (5, columns), (2, 17, columns)):
        inputs = torch.randn(*shape).to(torch.bfloat16)
        expected = inputs.double() @ quantized.dequantize().double().T + bias
        got = layer(inputs.float())
        assert got.shape == expected.shape
        assert got.dtype == torch.float32
        assert float((got - expected).norm() / expected.norm()) < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 128), (4, 256), (4, None), (8, None)])
def test_kernels_of_the_gpu(bits: int, group: int | None) -> None:
    device = torch.device("cuda")
    quantized = matrix(bits, group, True, 64, 512)
    reason = obstacle(quantized, device)
    if reason is not None:
        pytest.skip(reason)
    layer = pack(quantized, None, device, torch.bfloat16)
    check_product(layer, quantized, device)


def test_inputs_may_lie_anywhere_in_memory() -> None:
    """The int8 kernel reads with aligned loads: a view that starts in the middle must not crash it."""
    quantized = matrix(8, None, True, 32, 64)
    layer = pack(quantized, None, CPU, torch.float32)
    storage = torch.randn(3 * 64 + 5).to(torch.bfloat16)
    for start in range(5):
        inputs = storage[start : start + 3 * 64].view(3, 64)
        expected = inputs.double() @ quantized.dequantize().double().T
        assert float((layer(inputs) - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize(
    ("bits", "group", "columns", "words"),
    [
        (4, 16, 64, "groups of 16 inputs"),
        (4, None, 80, "groups of 80 inputs"),
        (8, 32, 64, "8 bits with 2 groups"),
        (8, None, 40, "40 inputs"),
    ],
)
def test_what_no_kernel_takes(bits: int, group: int | None, columns: int, words: str) -> None:
    reason = obstacle(matrix(bits, group, True, 32, columns), CPU)
    assert reason is not None
    assert words in reason


def session(runtime: str, folder: Path, dtype: str = "float32") -> Session:
    artifact = Artifact.open(folder)
    return find(runtime).load(artifact, resolve("auto", artifact.config), Placement(dtype=dtype))


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "packing", "kernel"),
    [
        (4, 32, True, "pack-quantized", "int4"),
        (3, 32, False, "pack-quantized", "int4"),
        (2, None, True, "pack-quantized", "int4"),
        (8, None, True, "pack-quantized", "int8"),
        (8, None, False, "pack-quantized", "int8"),
        (8, None, True, "int-quantized", "int8"),
    ],
)
def test_it_runs_what_the_library_wrote(
    tmp_path: Path, bits: int, group: int | None, symmetric: bool, packing: str, kernel: str
) -> None:
    source = models_zoo.write("llama", tmp_path)
    folder = quantized_models.write(
        source, tmp_path / "after", bits=bits, group=group, symmetric=symmetric, packing=packing
    )
    dense, packed = session("torch-eager", folder), session("torch-int4", folder)
    assert packed.facts["kernels"] == {kernel: 21}
    assert packed.facts["dense_layers"] == {}
    tokens = models_zoo.tokens()
    expected, got = dense.outputs(tokens), packed.outputs(tokens)
    assert float((got - expected).norm() / expected.norm()) < 0.03
    assert packed.facts["weight_bytes"] < dense.facts["weight_bytes"] / 2
    state = packed.prefill(tokens)
    assert torch.equal(packed.decode(state).tokens, packed.decode(packed.prefill(tokens)).tokens)


def test_a_layer_that_fits_no_kernel_stays_dense_and_is_named(tmp_path: Path) -> None:
    source = models_zoo.write("llama", tmp_path)
    folder = quantized_models.write(source, tmp_path / "after", bits=8, group=None)
    config = Artifact.open(folder).config
    assert config["quantization_config"]
    mixed = quantized_models.write(
        source, tmp_path / "mixed", bits=8, group=64, leave=("lm_head", "self_attn", "up_proj", "gate_proj")
    )
    packed = session("torch-int4", mixed)
    assert packed.facts["kernels"] == {"int8": 3}
    with pytest.raises(Unavailable, match="none of 21 quantized layers fits"):
        session("torch-int4", quantized_models.write(source, tmp_path / "groups", bits=8, group=16))
    grouped = quantized_models.write(source, tmp_path / "some", bits=8, group=32)
    partly = session("torch-int4", grouped)
    assert partly.facts["kernels"] == {"int8": 18}
    assert sorted(partly.facts["dense_layers"]) == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    dense = session("torch-eager", grouped)
    tokens = models_zoo.tokens()
    expected = dense.outputs(tokens)
    assert float((partly.outputs(tokens) - expected).norm() / expected.norm()) < 0.03


def test_an_encoder_runs_packed(tmp_path: Path) -> None:
    source = models_zoo.write("bert", tmp_path)
    folder = quantized_models.write(source, tmp_path / "after", bits=4, group=32, leave=("pooler",))
    dense, packed = session("torch-eager", folder), session("torch-int4", folder)
    tokens = models_zoo.tokens()
    expected = dense.outputs(tokens)
    assert packed.facts["kernels"] == {"int4": 18}
    assert float((packed.outputs(tokens) - expected).norm() / expected.norm()) < 0.03


def test_a_float_model_is_not_available(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no integer weights"):
        session("torch-int4", models_zoo.write("llama", tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activations": "dynamic"}, "quantizes its inputs"),
        ({"format": "fp8"}, "stored as fp8 numbers, which no kernel here runs"),
        ({"format": "nvfp4"}, "stored as nvfp4 numbers"),
    ],
)
def test_small_floats_and_quantized_inputs_are_not_available(
    options: dict[str, str], words: str, tmp_path: Path
) -> None:
    source = models_zoo.write("llama", tmp_path, dtype=torch.bfloat16)
    recipe = {"model": str(source), "device": "cpu", "steps": [{"use": "quantize.rtn", **options}]}
    folder = engine.run(recipe, tmp_path / "out", single=True).final
    with pytest.raises(Unavailable, match=words):
        session("torch-int4", folder)
