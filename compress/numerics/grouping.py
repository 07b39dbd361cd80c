"""How the columns of a matrix fall into groups, and how to walk over its rows in bounded memory."""

from collections.abc import Iterator

import torch

from compress.core.scheme import Scheme

CHUNK_ELEMENTS = 1 << 18
"""Elements that one step of a row-wise computation handles: 1 MiB of float32 for each temporary."""
DEVICE_ELEMENTS = 1 << 26
"""Weights that are solved at once on an accelerator, which wants many rows: 256 MiB a float32 copy."""
HOST_ROWS = 2048
"""Rows that are solved at once on a CPU: enough that the walk over the columns costs little, few enough
that the copies stay small beside the block that the weights belong to."""


def check_groups(columns: int, scheme: Scheme) -> None:
    """Refuse a matrix that the groups of a scheme do not divide.

    Raises:
        ValueError: the group size does not divide the columns; plans refuse such layers earlier.
    """
    if not scheme.divides(columns):
        raise ValueError(f"{columns} columns cannot be divided into groups of {scheme.group_size}")


def group_width(columns: int, scheme: Scheme) -> int:
    """How many columns share one scale; all of them for a scheme of one scale a row."""
    return columns if scheme.group_size is None else scheme.group_size


def grouped(matrix: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """View ``[rows, columns]`` as ``[rows, groups, width]``.

    Raises:
        ValueError: the group size does not divide the columns.
    """
    check_groups(matrix.shape[1], scheme)
    rows, columns = matrix.shape
    return matrix.reshape(rows, scheme.groups(columns), group_width(columns, scheme))


def row_chunks(matrix: torch.Tensor, elements: int = CHUNK_ELEMENTS) -> Iterator[slice]:
    """Slices that cover all rows, each of at most ``elements`` matrix elements and at least one row."""
    rows, columns = matrix.shape
    step = max(1, elements // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def working_rows(weight: torch.Tensor) -> Iterator[slice]:
    """Rows of a matrix ``[rows, columns]`` that are solved together, where none depends on another."""
    host = weight.device.type == "cpu"
    return row_chunks(weight, HOST_ROWS * weight.shape[1] if host else DEVICE_ELEMENTS)
