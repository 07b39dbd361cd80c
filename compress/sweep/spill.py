"""Activations up to a number of bytes in memory, and what comes beyond in a file.

The file has no name: the system takes it back when the process ends, whatever ends it. Tensors are read from
it and not mapped, as weights are (`compress.models.checkpoint`): what was read of a mapped file stays
resident until the mapping goes.
"""

import tempfile
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import IO, Any, final

import torch

from compress.core.errors import EnvironmentFault


@final
class Kept:
    """A tensor in memory or on disk; its place is free again when nobody holds this any more."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], read: Callable[[], torch.Tensor]) -> None:
        self.dtype = dtype
        self.shape = shape
        self.read = read
        """Brings the tensor."""


@final
class Spill:
    """Where the activations of a run are kept.

    Args:
        folder: of the file, which is made when something is written to it.
        limit: bytes of tensors in memory; none keeps all of them there.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self._folder = folder
        self._limit = limit
        self._held = 0
        self._file: IO[bytes] | None = None
        self._end = 0
        self._free: dict[int, list[int]] = defaultdict(list)
        """Places in the file that are free again, by their size: the tensors of a run are of few sizes."""

    @property
    def memory_bytes(self) -> int:
        """Bytes of the tensors in memory."""
        return self._held

    @property
    def file_bytes(self) -> int:
        """The size of the file."""
        return self._end

    def keep(self, tensor: torch.Tensor) -> Kept:
        """Keep a tensor of the host: in memory while there is room, on disk otherwise.

        Raises:
            EnvironmentFault: it cannot be written.
        """
        size, dtype, shape = tensor.nbytes, tensor.dtype, tuple(tensor.shape)
        if self._limit is None or self._held + size <= self._limit:
            self._held += size
            kept = Kept(dtype, shape, lambda: tensor)
            weakref.finalize(kept, self._forget, size)
            return kept
        start = self._free[size].pop() if self._free[size] else self._end
        self._end = max(self._end, start + size)
        self._write(start, tensor)
        kept = Kept(dtype, shape, lambda: self._read(start, size).view(dtype).reshape(shape))
        weakref.finalize(kept, self._free[size].append, start)
        return kept

    def _forget(self, size: int) -> None:
        self._held -= size

    def _write(self, start: int, tensor: torch.Tensor) -> None:
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - open as long as this is
                weakref.finalize(self, self._file.close)
            self._file.seek(start)
            self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as error:
            raise EnvironmentFault(
                f"activations do not fit into {self._folder}: {error.strerror or error}",
                "free some room, or allow them more memory (--activations-memory)",
            ) from error

    def _read(self, start: int, size: int) -> torch.Tensor:
        """So many bytes from the file, uint8, in memory of their own."""
        raw = torch.empty(size, dtype=torch.uint8)
        if self._file is None:
            raise TypeError("nothing was written that could be read")
        self._file.seek(start)
        if self._file.readinto(raw.numpy().data) != size:  # type: ignore[attr-defined]
            raise EnvironmentFault(
                f"the file of activations in {self._folder} ended while it was read", "is the disk sound?"
            )
        return raw


@final
class Shelf(MutableMapping[int, Any]):
    """Tensors, or tuples with tensors among other values, by number; what is asked for is brought.

    Args:
        spill: where the tensors are.
    """

    def __init__(self, spill: Spill) -> None:
        self._spill = spill
        self._kept: dict[int, Any] = {}

    def kept(self, key: int) -> Any:
        """What lies under a number with `Kept` in the place of tensors."""
        return self._kept[key]

    def __setitem__(self, key: int, value: Any) -> None:
        # First gone, then put: the new value takes the place of the old one.
        self._kept.pop(key, None)
        self._kept[key] = tuple(map(self._put, value)) if isinstance(value, tuple) else self._put(value)

    def __getitem__(self, key: int) -> Any:
        kept = self._kept[key]
        return tuple(map(_brought, kept)) if isinstance(kept, tuple) else _brought(kept)

    def __delitem__(self, key: int) -> None:
        del self._kept[key]

    def __iter__(self) -> Iterator[int]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def _put(self, value: Any) -> Any:
        return self._spill.keep(value) if isinstance(value, torch.Tensor) else value


def _brought(kept: Any) -> Any:
    return kept.read() if isinstance(kept, Kept) else kept
