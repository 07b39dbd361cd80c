"""The operator's layout, held against ONNX Runtime itself."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from compress.core.errors import ModelError
from compress.core.scheme import Scheme
from compress.formats.matmul_nbits import DOMAIN, OPERATOR, Packed, block_size, encoded_bytes, pack, unpack
from compress.numerics.affine import Quantized


def matrix(bits: int, group: int | None, symmetric: bool, rows: int, columns: int) -> Quantized:
    generator = torch.Generator().manual_seed(bits)
    scheme = Scheme(bits, group, symmetric)
    bounds = (scheme.lowest, scheme.highest + 1)
    q = torch.randint(*bounds, (rows, columns), generator=generator).to(torch.int8)
    # Of either sign, as a search of ranges leaves them.
    scale = torch.randn(rows, scheme.groups(columns), generator=generator) * 0.1
    zero = None
    if not symmetric:
        zero = torch.randint(*bounds, tuple(scale.shape), generator=generator).to(torch.int8)
    return Quantized(q, scale, zero, scheme)


def product(packed: Packed, inputs: torch.Tensor, level: int) -> torch.Tensor:
    """What ONNX Runtime computes with one operator."""
    helper = onnx.helper
    operands = {"B": packed.integers, "scales": packed.scales}
    if packed.zeros is not None:
        operands["zero_points"] = packed.zeros
    node = helper.make_node(
        OPERATOR, ["A", *operands], ["Y"], domain=DOMAIN, accuracy_level=level, **packed.attributes
    )
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("A", kind, [None, packed.columns])],
        [helper.make_tensor_value_info("Y", kind, [None, packed.rows])],
        [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in operands.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(np.asarray(session.run(None, {"A": inputs.numpy()})[0]))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group", "rows", "columns"),
    [
        (2, 16, 8, 48),
        (3, 32, 5, 96),
        (4, 16, 24, 32),
        (4, 32, 33, 96),
        (4, 48, 7, 96),
        (4, 64, 16, 64),
        (4, 128, 16, 384),
        (4, 256, 16, 512),
        (4, 512, 16, 1024),
        (4, None, 9, 96),
        (4, None, 9, 40),
        (8, 32, 33, 96),
        (8, 128, 16, 256),
        (8, None, 33, 64),
        (8, None, 6, 20),
    ],
)
def test_onnx_runtime_multiplies_with_the_weights_that_were_meant(
    bits: int, group: int | None, rows: int, columns: int, symmetric: bool
) -> None:
    quantized = matrix(bits, group, symmetric, rows, columns)
    packed = pack(quantized, torch.float32)
    meant = quantized.dequantize()
    assert torch.equal(unpack(packed).float(), meant)
    inputs = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    expected = inputs.double() @ meant.double().T
    exact, fast = product(packed, inputs, 0), product(packed, inputs, 4)
    assert float((exact - expected).abs().max() / expected.abs().max()) < 1e-5
    assert float((fast - expected).norm() / expected.norm()) < 0.02
    total = packed.integers.nbytes + packed.scales.nbytes
    total += 0 if packed.zeros is None else packed.zeros.nbytes
    assert encoded_bytes(rows, columns, bits, group, symmetric=symmetric) == total


def test_golden_bytes() -> None:
    q = torch.arange(-8, 8, dtype=torch.int8).reshape(1, 16)
    zero = torch.tensor([[-3]], dtype=torch.int8)
    packed = pack(Quantized(q, torch.tensor([[0.5]]), zero, Scheme(4, 16, False)), torch.float32)
    assert packed.integers.flatten().tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert packed.zeros is not None
    assert packed.zeros.tolist() == [[5]]
    assert packed.attributes == {"K": 16, "N": 1, "bits": 4, "block_size": 16}


@pytest.mark.parametrize(
    ("group", "columns", "block"),
    [
        (32, 64, 32),
        (96, 192, 32),
        (512, 1024, 256),
        (None, 96, 32),
        (None, 20, 16),
        (24, 48, 0),
        (40, 40, 16),
    ],
)
def test_the_block_is_the_longest_within_a_group(group: int | None, columns: int, block: int) -> None:
    assert block_size(group, columns) == block


def test_what_the_operator_cannot_hold_is_refused() -> None:
    with pytest.raises(ModelError, match="groups of 24 inputs"):
        pack(matrix(4, 24, True, 4, 48), torch.float32)
    tiny = Quantized(torch.ones(1, 16, dtype=torch.int8), torch.tensor([[1e-9]]), None, Scheme(4, None, True))
    with pytest.raises(ModelError, match="zero or infinite in float16"):
        pack(tiny, torch.float16)
