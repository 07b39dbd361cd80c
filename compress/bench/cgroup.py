"""A memory cgroup of its own for one measured process: what the kernel charges it for.

The resident set counts pages that other processes use as well; a cgroup's peak is what a container of this
size would need, page cache included. Making one takes permission, which many systems do not give: then
there is no such number, and the report says why.
"""

import os
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/sys/fs/cgroup")
_PEAKS: Final = ("memory.peak", "memory.max_usage_in_bytes")
"""Of the second version of cgroups, and of the first."""


def _here() -> Path | None:
    """The folder of the memory cgroup that this process is in."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _ROOT / "memory" / path.lstrip("/")
        if number == "0" and (_ROOT / "cgroup.controllers").is_file():
            return _ROOT / path.lstrip("/")
    return None


def _made(name: str) -> Path | str:
    """A new memory cgroup below our own; its folder, or why that cannot be."""
    parent = _here()
    if parent is None:
        return "this system has no memory cgroups"
    folder = parent / name
    try:
        folder.mkdir()
    except OSError as error:
        return f"no memory cgroup of its own may be made: {error.strerror or error}"
    if not any((folder / file).is_file() for file in _PEAKS):
        leave(folder)
        return "memory is not accounted for in cgroups here"
    return folder


def enter(name: str) -> Path | str:
    """Move this process into a new memory cgroup; its folder, or why that cannot be."""
    folder = _made(name)
    if isinstance(folder, str):
        return folder
    try:
        (folder / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    except OSError as error:
        leave(folder)
        return f"its memory cgroup may not be entered: {error.strerror or error}"
    return folder


def obstacle() -> str | None:
    """Why a process here could make no memory cgroup, or nothing; nothing is left behind."""
    folder = _made(f"compress-try-{os.getpid()}")
    if isinstance(folder, str):
        return folder
    leave(folder)
    return None


def leave(folder: Path) -> None:
    """Remove the cgroup of a process that has ended; one that is still used stays."""
    try:
        folder.rmdir()
    except OSError:
        return


def remove(name: str) -> None:
    """Remove the cgroup that a child of this process made for itself, if it made one."""
    parent = _here()
    if parent is not None and (parent / name).is_dir():
        leave(parent / name)


def peak_bytes(folder: Path) -> int | None:
    """The most that was charged to a cgroup at once, in bytes."""
    for file in _PEAKS:
        try:
            return int((folder / file).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
    return None
