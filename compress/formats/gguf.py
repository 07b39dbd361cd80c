"""GGUF: one file with weights, configuration and tokenizer, which llama.cpp and what is built on it load.

Integers lie in blocks of 32 along the input, each with numbers of its own in float16, ``d`` of either sign:

- ``Q4_0``: ``d``, then 16 bytes; byte ``j`` holds value ``j`` low and value ``j + 16`` high, less 8;
- ``Q4_1``: ``d`` and ``m``, then 16 bytes in the same order; a value is ``d * q + m``, ``q`` from 0 to 15;
- ``Q8_0``: ``d``, then 32 signed bytes.

So a symmetric matrix of up to 4 bits is a Q4_0, one of up to 8 bits a Q8_0, and an asymmetric one of up to 4
bits a Q4_1 with ``m = -zero * scale``, where float16 holds that product. Longer groups repeat their scale.
Floats may also be rounded to k-quants (`compress.numerics.k_quants`), which no group of ours is.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, ``gguf-py`` and ``ggml-quants.c`` of llama.cpp

llama.cpp rotates neighbouring pairs in attention where transformers rotates halves, so in the architecture
``llama`` the rows of queries and keys are stored in another order (`permuted`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeGuard

import torch

from compress.core.errors import EnvironmentFault, ModelError, PlanError
from compress.core.scheme import Scheme
from compress.formats import k_quants
from compress.formats.packed import Inexact, halves
from compress.numerics.affine import Quantized
from compress.numerics.k_quants import KINDS, KQuant, quantize

if TYPE_CHECKING:
    import numpy

FILE: Final = "model.gguf"
BLOCK: Final = 32
BlockType = Literal["Q4_0", "Q4_1", "Q8_0"]

ARCHITECTURES: Final[Mapping[str, str]] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
"""``model_type`` of transformers to the format's own name, for what computes the same in llama.cpp."""


def require_package() -> None:
    """Refuse where the format's own package is missing.

    Raises:
        EnvironmentFault: how to install it.
    """
    if find_spec("gguf") is None:
        raise EnvironmentFault("GGUF needs gguf, not installed here", "pip install 'compress-models[gguf]'")


def block_of(kind: str) -> tuple[int, int]:
    """How many weights a type takes together, and in how many bytes, by the format's own table."""
    import gguf

    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(weights), int(size)


def block_type(scheme: Scheme) -> BlockType | None:
    """The type of block that holds integers of a scheme exactly, or ``None``."""
    if scheme.symmetric:
        return "Q4_0" if scheme.bits <= 4 else "Q8_0"
    return "Q4_1" if scheme.bits <= 4 else None


def obstacle(scheme: Scheme, columns: int) -> str | None:
    """Why a matrix cannot be held in blocks, or ``None``."""
    if columns % BLOCK:
        return f"{columns} inputs, not a multiple of GGUF's blocks of {BLOCK}"
    if scheme.group_size is not None and scheme.group_size % BLOCK:
        return f"groups of {scheme.group_size} inputs, not a multiple of GGUF's blocks of {BLOCK}"
    if block_type(scheme) is None:
        return f"{scheme}; GGUF has no type with zero points of more than 4 bits"
    return None


def block_bytes(rows: int, columns: int, scheme: Scheme) -> int:
    """Bytes of a matrix without `obstacle`."""
    kind = block_type(scheme)
    return 0 if kind is None else rows * (columns // BLOCK) * block_of(kind)[1]


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks.

    Attributes:
        kind: which.
        data: uint8 ``[rows, bytes]``.
        value: what a reader makes of it, float32 ``[rows, columns]``.
        scale: as it is stored, in float32 ``[rows, groups]``.
    """

    kind: BlockType
    data: torch.Tensor
    value: torch.Tensor
    scale: torch.Tensor


def pack(matrix: Quantized, layer: str, inexact: Inexact = "refuse") -> Blocks:
    """The blocks that hold a matrix without `obstacle`.

    Args:
        matrix: integers with scales.
        layer: its name, for messages.
        inexact: what to do about scales and offsets that float16 does not hold.

    Raises:
        PlanError: a number is not exact in float16.
        ModelError: the matrix has an `obstacle`.
    """
    scheme = matrix.scheme
    kind, reason = block_type(scheme), obstacle(scheme, matrix.columns)
    if kind is None or reason is not None:
        raise ModelError(f"{layer} is {reason}", "choose another group size")
    scale = halves(matrix.scale, "scale", layer, inexact)
    parts = [_repeated(scale, matrix.columns)]
    blocks = matrix.q.unflatten(1, (-1, BLOCK))
    if kind == "Q8_0":
        return Blocks(kind, _bytes([*parts, blocks]), _value(matrix, scale.float()), scale.float())
    if kind == "Q4_0":
        unsigned = (blocks.to(torch.int16) + 8).to(torch.uint8)
        return Blocks(
            kind, _bytes([*parts, _nibbles(unsigned)]), _value(matrix, scale.float()), scale.float()
        )
    if matrix.zero is None:
        raise ModelError(f"{layer} is asymmetric and has no zero points")
    unsigned = (blocks.to(torch.int16) - scheme.lowest).to(torch.uint8)
    # In float32 the product of 11 bits and 5 is exact.
    offset = (scheme.lowest - matrix.zero.float()) * scale.float()
    minimum = halves(offset, "offset -zero * scale", layer, inexact)
    data = _bytes([*parts, _repeated(minimum, matrix.columns), _nibbles(unsigned)])
    products = _spread((matrix.q.to(torch.int16) - scheme.lowest).float(), scale.float())
    value = products + minimum.float().repeat_interleave(matrix.columns // matrix.groups, dim=1)
    return Blocks(kind, data, value, scale.float())


def _value(matrix: Quantized, scale: torch.Tensor) -> torch.Tensor:
    return _spread(matrix.q.float(), scale)


def _spread(integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    groups = integers.unflatten(1, (scale.shape[1], -1))
    return torch.mul(groups, scale.unsqueeze(-1)).flatten(1)


def _repeated(values: torch.Tensor, columns: int) -> torch.Tensor:
    """A number a group, ``[rows, groups]``, as one a block, ``[rows, blocks, 1]``."""
    times = columns // BLOCK // values.shape[1]
    return values.repeat_interleave(times, dim=1).unsqueeze(-1).contiguous()


def _nibbles(unsigned: torch.Tensor) -> torch.Tensor:
    """Values ``[rows, blocks, 32]`` from 0 to 15 as bytes ``[rows, blocks, 16]``."""
    half = BLOCK // 2
    return torch.bitwise_or(unsigned[..., :half], unsigned[..., half:] << 4).contiguous()


def _bytes(parts: list[torch.Tensor]) -> torch.Tensor:
    """Parts of blocks, ``[rows, blocks, n]`` of any type, side by side as bytes ``[rows, bytes]``."""
    return torch.cat([part.view(torch.uint8) for part in parts], dim=-1).flatten(1).contiguous()


class Names:
    """The format's names of a model's tensors, from its own tables.

    Args:
        architecture: the format's, a value of `ARCHITECTURES`.
        blocks: transformer blocks of the model.
    """

    def __init__(self, architecture: str, blocks: int) -> None:
        import gguf

        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        self._table = gguf.get_tensor_name_map(kinds[architecture], blocks)

    def of(self, name: str) -> str | None:
        """The name of a tensor that transformers calls ``name``; ``None`` where the format has none."""
        return self._table.get_name(name, try_suffixes=(".weight", ".bias"))


def heads_of(name: str, architecture: str, heads: int, key_heads: int) -> int | None:
    """How many heads the rows of a tensor of the format belong to, where they are stored permuted."""
    if architecture != "llama":
        return None
    part = name.rpartition(".")[0].rpartition(".")[2]
    return {"attn_q": heads, "attn_k": key_heads}.get(part)


def permuted(rows: int, heads: int, *, back: bool = False) -> torch.Tensor:
    """The order in which rows are stored, of queries or keys with this many heads.

    transformers rotates value ``i`` of a head with value ``i + half``, llama.cpp ``2i`` with ``2i + 1``.

    Args:
        rows: of the matrix.
        heads: that share them.
        back: the order that undoes it.

    Returns:
        int64 ``[rows]``: for each row of the result, which row it was.
    """
    shape = (heads, -1, 2) if back else (heads, 2, -1)
    return torch.arange(rows).reshape(shape).transpose(1, 2).flatten()


@dataclass(frozen=True)
class Stored:
    """A tensor of a file as a reader sees it.

    Attributes:
        name: the format's.
        kind: its type (``Q4_0``, ``F32``).
        value: float32, in the order of rows that transformers has.
    """

    name: str
    kind: str
    value: torch.Tensor


class File:
    """A GGUF file, read with the format's own package.

    Raises:
        EnvironmentFault: the package is missing.
        ModelError: the file is no GGUF file.
    """

    def __init__(self, path: Path) -> None:
        require_package()
        import gguf

        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            raise ModelError(f"{path} is no whole GGUF file: {error}", "make the artifact again") from error
        self.architecture = str(self.field("general.architecture"))

    def field(self, key: str) -> Any:
        """One entry of the metadata.

        Raises:
            ModelError: there is none.
        """
        found = self._reader.fields.get(key)
        if found is None:
            raise ModelError(f"the GGUF file has no {key}", "make the artifact again")
        return found.contents()

    @property
    def names(self) -> list[str]:
        """The format's names of all tensors, in the order of the file."""
        return [tensor.name for tensor in self._reader.tensors]

    def tensors(self) -> Iterator[Stored]:
        """All tensors, one at a time, dequantized by the format's own package."""
        import gguf

        heads = int(self.field(f"{self.architecture}.attention.head_count"))
        key_heads = int(self.field(f"{self.architecture}.attention.head_count_kv"))
        for tensor in self._reader.tensors:
            value = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
            sharing = heads_of(tensor.name, self.architecture, heads, key_heads)
            if sharing is not None:
                value = value[permuted(value.shape[0], sharing, back=True)]
            yield Stored(tensor.name, tensor.tensor_type.name, value)


class Writer:
    """Writes a file tensor by tensor; the same contents give the same bytes.

    Args:
        path: the file.
        architecture: the format's.
    """

    def __init__(self, path: Path, architecture: str) -> None:
        import gguf

        self.metadata: gguf.GGUFWriter = gguf.GGUFWriter(path, architecture)

    def announce(self, name: str, kind: str, shape: tuple[int, ...]) -> None:
        """Say what tensor will come, before the first one does, in the order of the file.

        Args:
            name: the format's.
            kind: the format's type.
            shape: of the values.
        """
        import gguf
        import numpy

        qtype = gguf.GGMLQuantizationType[kind]
        stored = gguf.quant_shape_to_byte_shape(shape, qtype)
        size = int(numpy.prod(stored))
        self.metadata.add_tensor_info(name, stored, numpy.dtype(numpy.uint8), size, raw_dtype=qtype)

    def begin(self) -> None:
        """Write everything that comes before the first tensor."""
        self.metadata.write_header_to_file()
        self.metadata.write_kv_data_to_file()
        self.metadata.write_ti_data_to_file()

    def write(self, data: torch.Tensor) -> None:
        """The bytes of the next tensor, uint8."""
        values: numpy.ndarray[Any, Any] = data.contiguous().numpy()
        self.metadata.write_tensor_data(values)

    def close(self) -> None:
        """Finish the file."""
        self.metadata.close()


def as_floats(value: torch.Tensor, kind: str, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A float tensor in one of the format's types.

    Args:
        value: of any float dtype.
        kind: ``F32``, ``F16`` or ``BF16``; ``Q8_0``, which the format's own package rounds; or a k-quant.
        layer: its name, for messages.

    Returns:
        its bytes, uint8; and what a reader makes of them, float32.

    Raises:
        PlanError: a value is out of float16's range.
    """
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if kind in dtypes:
        stored = value.to(dtypes[kind]).contiguous()
        if kind == "F16" and not bool(torch.isfinite(stored).all()):
            halves(value[~torch.isfinite(stored)], "weight", layer, "round")
        return stored.view(torch.uint8), stored.float()
    if _is_k_quant(kind):
        return _as_k_quant(value, kind, layer)
    import gguf

    qtype = gguf.GGMLQuantizationType[kind]
    data = gguf.quantize(value.float().numpy(), qtype)
    return torch.from_numpy(data), torch.from_numpy(gguf.dequantize(data, qtype)).float()


def _is_k_quant(kind: str) -> TypeGuard[KQuant]:
    return kind in KINDS


def _as_k_quant(value: torch.Tensor, kind: KQuant, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = quantize(value, kind)
    found = blocks.value()
    if not bool(torch.isfinite(found).all()):
        raise PlanError(
            f"{layer}: a scale of {kind} is out of float16's range, or a weight is not finite",
            "export as bf16 or f32 (--type bf16), or scale the model's weights",
        )
    return k_quants.packed(blocks).reshape(value.shape[0], -1), found.reshape(value.shape)
