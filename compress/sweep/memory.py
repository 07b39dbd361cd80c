"""Giving freed memory back to the system."""

import ctypes
import ctypes.util
from functools import cache
from typing import Any, Final

_MMAP_THRESHOLD: Final = -3
"""glibc's name for `M_MMAP_THRESHOLD`, of malloc.h."""
_LARGE_BYTES: Final = 2**21
"""A tensor from this size on gets pages of its own. The temporaries of a row-wise computation are smaller
(`numerics.grouping.CHUNK_ELEMENTS`), so that what comes and goes most often pays for no system call."""


@cache
def _libc() -> Any:
    name = ctypes.util.find_library("c")
    library = ctypes.CDLL(name) if name else None
    return library if library is not None and hasattr(library, "malloc_trim") else None


def return_large_at_once() -> None:
    """From now on give the pages of every large tensor back when it is freed, where glibc allocates.

    Left alone, glibc raises the size from which an allocation has pages of its own with every one that is
    freed, up to 32 MiB. The matrices of a block then come from one heap, which their differing sizes
    fragment: a solve was seen to hold 170 MiB more than it used. Holds for the whole process; the price is
    about a twentieth of the processor time of a calibrated run.
    """
    library = _libc()
    if library is not None:
        library.mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)


def return_freed() -> None:
    """Hand the pages of freed tensors back, where the C library can (glibc).

    glibc keeps what is freed for the next allocation, and the tensors of a block are of many sizes: over
    many blocks the process would hold several blocks' worth of pages that nothing uses.
    """
    library = _libc()
    if library is not None:
        library.malloc_trim(0)
