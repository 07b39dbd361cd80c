"""Matrix products in full float32, whatever the process has allowed for speed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products as float32 while the block runs, and restore the settings after it.

    TF32 keeps 10 bits of each factor; a Hessian summed that way is off by 1e-3, which is of the order of
    the damping that has to make it positive definite.
    """
    # The stubs do not know the matmul settings of mkldnn.
    mkldnn: Any = torch.backends.mkldnn
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
