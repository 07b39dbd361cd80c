"""One pass over the weights: NaN and infinity, and values that look like a flipped bit.

Works on the bits, so that no float is computed: a floating-point number is NaN or infinite exactly when
all bits of its exponent are set, and the bits of two positive numbers order as the numbers do. Memory is
one chunk, whatever the size of a tensor.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from compress.core.artifact import file_digest
from compress.core.errors import EnvironmentFault, ModelError
from compress.models.headers import Tensor

CHUNK_BYTES = 1 << 20
OUTLIER = 1e4
"""How many times the scale of its tensor makes a value suspicious."""

_SAMPLE = 1 << 16
_ENOUGH = 1 << 12
_VERSION = 1


@dataclass(frozen=True)
class _Layout:
    """How a floating-point type lies in its bits.

    Attributes:
        width: bytes.
        fraction: bits of the fraction.
        exponent: bits of the exponent.
        highest: the largest magnitude, as an integer, that is a finite number.
    """

    width: int
    fraction: int
    exponent: int
    highest: int

    @property
    def magnitude(self) -> int:
        """All bits but the sign."""
        return (1 << (self.fraction + self.exponent)) - 1

    @property
    def unsigned(self) -> np.dtype[np.unsignedinteger]:
        """The integer type of the same width."""
        return np.dtype(f"<u{self.width}")

    def value(self, bits: int) -> float:
        """The number that a magnitude stands for."""
        bias = (1 << (self.exponent - 1)) - 1
        exponent, fraction = bits >> self.fraction, bits & ((1 << self.fraction) - 1)
        if exponent == 0:
            return float(fraction * 2.0 ** (1 - bias - self.fraction))
        return float((1 + fraction / (1 << self.fraction)) * 2.0 ** (exponent - bias))


def _ieee(width: int, exponent: int) -> _Layout:
    fraction = 8 * width - 1 - exponent
    return _Layout(width, fraction, exponent, (((1 << exponent) - 1) << fraction) - 1)


_LAYOUTS = {
    "F64": _ieee(8, 11),
    "F32": _ieee(4, 8),
    "F16": _ieee(2, 5),
    "BF16": _ieee(2, 8),
    "F8_E5M2": _ieee(1, 5),
    # No infinity, and only the pattern of all ones is NaN (https://arxiv.org/abs/2209.05433).
    "F8_E4M3": _Layout(1, 3, 4, 0x7E),
}


def scan(tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, str]]:
    """Look at every float tensor; yields each one looked at, with a warning or an empty string.

    A value beyond 1e4 times the 99.99th percentile of its tensor's magnitudes (taken from an even sample)
    is what a flipped high bit of an exponent looks like, and a trained weight hardly ever. It is worth a
    warning, not an error. A flip in a fraction or a low bit of the exponent leaves an ordinary number: of a
    model whose digest nobody wrote down, it cannot be found by any means.

    Raises:
        ModelError: a value is NaN or infinite; names the tensor and the place.
        EnvironmentFault: a file cannot be read.
    """
    for tensor in tensors:
        layout = _LAYOUTS.get(tensor.dtype)
        yield tensor, "" if layout is None else _look(tensor, layout)


def remembered(file: Path) -> list[str] | None:
    """The warnings of an earlier scan that found the same bytes finite, or ``None``.

    The memory is a note in ``$XDG_CACHE_HOME/compress/finite`` under the digest of the contents;
    ``COMPRESS_DIGEST_CACHE=off`` does without.
    """
    note = _note(file)
    if note is None:
        return None
    try:
        document = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # No note, half a note from a crash, or a home that is not ours to read: scan again.
        return None
    if not isinstance(document, dict) or document.get("version") != _VERSION:
        return None
    return [str(warning) for warning in document["warnings"]]


def remember(file: Path, warnings: list[str]) -> None:
    """Note that the bytes of a file are finite."""
    note = _note(file)
    if note is None:
        return
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"version": _VERSION, "warnings": warnings}), encoding="utf-8")
        partial.replace(note)
    except OSError:
        # A read-only home costs time, never correctness.
        return


def _note(file: Path) -> Path | None:
    if os.environ.get("COMPRESS_DIGEST_CACHE", "on") == "off":
        return None
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "compress" / "finite" / file_digest(file)


def _look(tensor: Tensor, layout: _Layout) -> str:
    elements = (tensor.end - tensor.start) // layout.width
    stride = max(elements // _SAMPLE, 1)
    largest, where = -1, 0
    sample: list[NDArray[np.unsignedinteger]] = []
    for first, bits in _chunks(tensor, layout):
        highest = int(bits.max())
        if highest > layout.highest:
            place = int((bits > layout.highest).argmax())
            raise _not_finite(tensor, layout, first + place, int(bits[place]))
        if highest > largest:
            largest, where = highest, first + int(bits.argmax())
        sample.append(bits[-first % stride :: stride].copy())
    if elements < _ENOUGH:
        return ""
    magnitudes = np.sort(np.concatenate(sample))
    magnitudes = magnitudes[magnitudes > 0]
    if len(magnitudes) < _ENOUGH // 2:
        return ""
    scale = layout.value(int(magnitudes[min(int(0.9999 * len(magnitudes)), len(magnitudes) - 2)]))
    value = layout.value(largest)
    if value <= OUTLIER * scale:
        return ""
    return (
        f"{tensor.name}{_place(tensor, where)} of {tensor.file.name} is {value:.3g} in magnitude, "
        f"{value / scale:.0e} times the scale of its tensor: a damaged bit?"
    )


def _chunks(tensor: Tensor, layout: _Layout) -> Iterator[tuple[int, NDArray[np.unsignedinteger]]]:
    """Magnitudes as integers, with the number of the first element of each chunk."""
    try:
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.start)
            position = tensor.start
            while position < tensor.end:
                data = _exactly(stream, min(CHUNK_BYTES, tensor.end - position), tensor)
                bits = np.frombuffer(data, dtype=layout.unsigned) & layout.unsigned.type(layout.magnitude)
                yield (position - tensor.start) // layout.width, bits
                position += len(data)
    except OSError as error:
        raise EnvironmentFault(f"{tensor.file} cannot be read: {error.strerror or error}") from error


def _exactly(stream: BinaryIO, size: int, tensor: Tensor) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise ModelError(f"{tensor.file} became shorter while it was read", "is a download still running?")
    return data


def _not_finite(tensor: Tensor, layout: _Layout, where: int, bits: int) -> ModelError:
    infinite = bits == layout.highest + 1 and tensor.dtype != "F8_E4M3"
    return ModelError(
        f"{tensor.file}: tensor '{tensor.name}' holds {'an infinity' if infinite else 'a NaN'} "
        f"at {_place(tensor, where) or '[]'}",
        "the training diverged or the file is damaged: take another checkpoint or download it again",
    )


def _place(tensor: Tensor, where: int) -> str:
    return str([int(at) for at in np.unravel_index(where, tensor.shape)]) if tensor.shape else ""
