"""Which arms can be in memory together, so that they import side by side and then take turns."""

from collections.abc import Sequence
from typing import Final

from compress.bench import host
from compress.bench.arms import Arm

_SHARE: Final = 0.8
"""Of the memory that is free: what arms may take that are in it together."""
_LIBRARY_BYTES: Final = 2**30
"""What a process takes beside its models."""
_FLOATS: Final = 8
"""Bytes in memory for one on disk, at most: 4 bits become 32."""
_MOST_AT_ONCE: Final = 8


def fit(arms: Sequence[Arm], device: str) -> bool:
    """Whether these arms can be in memory together, by what each was seen to take at most.

    On a GPU they cannot take turns: an arm that waits is a foreign process to the one that works.
    """
    if device != "cpu":
        return False
    peaks = [(arm.reference or arm if arm.role == "again" else arm).peak_bytes for arm in arms]
    known = [peak for peak in peaks if peak is not None]
    return len(known) == len(peaks) and sum(known) <= _SHARE * host.free_bytes()


def groups(arms: Sequence[Arm], device: str) -> list[list[Arm]]:
    """The arms in groups that can be in memory together, where it was not seen yet what each takes.

    Expected are its weights as floats, those of its reference beside them, and what its libraries need.
    """
    room = _SHARE * host.free_bytes() if device == "cpu" else 0.0
    found: list[list[Arm]] = []
    for arm in arms:
        expected = sum(_expected_bytes(each) for each in [*(found[-1] if found else ()), arm])
        if found and expected <= room and len(found[-1]) < _MOST_AT_ONCE:
            found[-1].append(arm)
        else:
            found.append([arm])
    return found


def _expected_bytes(arm: Arm) -> int:
    models = [arm.artifact, *(() if arm.reference is None else (arm.reference.artifact,))]
    files = [file for model in models for file in model.weight_files]
    return _LIBRARY_BYTES + _FLOATS * sum(int(file.stat().st_size) for file in files)
