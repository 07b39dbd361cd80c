"""Giving freed memory back to the system."""

import ctypes
import ctypes.util
from functools import cache
from typing import Any


@cache
def _libc() -> Any:
    name = ctypes.util.find_library("c")
    library = ctypes.CDLL(name) if name else None
    return library if library is not None and hasattr(library, "malloc_trim") else None


def return_freed() -> None:
    """Hand the pages of freed tensors back, where the C library can (glibc).

    glibc keeps what is freed for the next allocation, and the tensors of a block are of many sizes: over
    many blocks the process would hold several blocks' worth of pages that nothing uses.
    """
    library = _libc()
    if library is not None:
        library.malloc_trim(0)
