"""The folder that a result goes to: claimed, locked, written beside, and put in place when complete.

Work happens in ``.NAME.partial`` beside the target, so a killed run never leaves half a result under its
name, and what stood there before stays until the new one is verified.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from compress.core.errors import EnvironmentFault, TargetError

PROGRESS_FOLDER = ".progress"
_KEY_FILE = "key"


class Target:
    """One output folder.

    Args:
        path: where the result will be.
        marker: a file whose presence says that the folder is of our making.
    """

    def __init__(self, path: Path, marker: str) -> None:
        self.path = path.absolute()
        self._marker = marker
        self.partial = self.path.with_name(f".{self.path.name}.partial")
        self._replaced = self.path.with_name(f".{self.path.name}.replaced")

    @property
    def progress(self) -> Path:
        """Progress that outlives a crash and is no part of the result."""
        return self.partial / PROGRESS_FOLDER

    def claim(self) -> None:
        """Refuse a folder that is not ours to write; creates nothing.

        Raises:
            TargetError: a file, or a folder with contents that we did not make.
            EnvironmentFault: no permission to write there.
        """
        if not self.path.name:
            raise TargetError(
                f"'{self.path}' has no name of its own", "give another --out, such as out/first"
            )
        if self.path.exists() and not self.path.is_dir():
            raise TargetError(
                f"{self.path} is a file, expected a folder for the result", "give another --out"
            )
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / self._marker).is_file():
            raise TargetError(
                f"{self.path} exists and was not made by compress (it has no {self._marker})",
                "give another --out, or move the folder away",
            )
        if (
            self.partial.exists()
            and not (self.progress / _KEY_FILE).is_file()
            and any(self.partial.iterdir())
        ):
            raise TargetError(
                f"{self.partial} is where work is kept, and was not made by compress", "move it away"
            )
        parent = self._existing_parent()
        if not os.access(parent, os.W_OK | os.X_OK):
            raise EnvironmentFault(f"no permission to write in {parent}", "give another --out")

    def room(self) -> int:
        """Free bytes where the result will be."""
        return shutil.disk_usage(self._existing_parent()).free

    def begin(self, key: str, *, fresh: bool = False) -> bool:
        """Make the working folder ready for a step; whether earlier progress of the same step is there."""
        note = self.progress / _KEY_FILE
        resumed = note.is_file() and note.read_text(encoding="ascii") == key and not fresh
        if not resumed and self.partial.exists():
            shutil.rmtree(self.partial)
        self.progress.mkdir(parents=True, exist_ok=True)
        note.write_text(key, encoding="ascii")
        return resumed

    def publish(self) -> None:
        """Put the finished working folder in place of the target."""
        if self.path.exists():
            if self._replaced.exists():
                shutil.rmtree(self._replaced)
            self.path.rename(self._replaced)
        self.partial.rename(self.path)
        self.tidy()

    def tidy(self) -> None:
        """Remove what a run that was killed at the very end may have left."""
        for leftover in (self.path / PROGRESS_FOLDER, self._replaced):
            if leftover.exists():
                shutil.rmtree(leftover)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the target; another run is refused, and a lock of a dead process does not count.

        Raises:
            TargetError: another run holds it.
        """
        made = self._make_parents()
        try:
            with self._held():
                yield
        finally:
            for folder in made:
                with contextlib.suppress(OSError):  # not empty: it holds the result, or progress towards it
                    folder.rmdir()

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        file = self.path.with_name(f".{self.path.name}.lock")
        with file.open("a+", encoding="ascii") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                stream.seek(0)
                owner = stream.read().strip() or "another process"
                raise TargetError(
                    f"{self.path} is in use by another run (process {owner})",
                    "wait for it, or give another --out",
                ) from error
            stream.truncate(0)
            stream.write(str(os.getpid()))
            stream.flush()
            try:
                yield
            finally:
                # Removed while it is held, so that nobody can lock a name that is about to go.
                file.unlink(missing_ok=True)

    def _make_parents(self) -> list[Path]:
        """Create the folders above the target; those created, innermost first."""
        missing = [folder for folder in self.path.parents if not folder.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return missing

    def _existing_parent(self) -> Path:
        return next(folder for folder in self.path.parents if folder.exists())
