"""Gradient checkpointing: blocks keep their input alone, and compute again in the backward pass.

Chen, Xu, Zhang and Guestrin 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174. The
switch of transformers works only on a model in training mode, which brings dropout along; a student trains
without it. So the blocks, found where every method finds them, get a forward that torch computes twice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from compress.models.blocks import find_blocks


@contextmanager
def recomputed(model: Any) -> Iterator[None]:
    """Inside, a forward pass with a graph keeps the input of each block and nothing else of it.

    Raises:
        ModelError: the model has no stack of blocks.
    """
    blocks = [block.module for block in find_blocks(model)]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
