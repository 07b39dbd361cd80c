"""The one tree of errors that a user may see.

Each kind has an exit code of its own, so that a pipeline can tell bad input from a full disk without
reading prose. The command line prints ``error: <message>`` and ``hint: <hint>``; a traceback appears
only with ``--debug``. Exit codes 10 to 13 belong to the verdicts of ``compress bench``.
"""

import difflib
from collections.abc import Iterable


class CompressError(Exception):
    """Something a user can act on.

    Args:
        message: what came and what was expected, in one sentence.
        hint: what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})" if self.hint else self.message


class UsageError(CompressError):
    """An unknown name, key or value in a command, a recipe or an option."""

    exit_code = 2


class ModelError(CompressError):
    """A model folder that is missing, damaged, unsafe or not understood."""

    exit_code = 3


class DataError(CompressError):
    """A text or data set that is missing, too short, binary, or does not fit the tokenizer."""

    exit_code = 4


class PlanError(CompressError):
    """A chain of passes that cannot work, or a layer that a format cannot hold."""

    exit_code = 5


class EnvironmentFault(CompressError):
    """The machine lacks something: disk, memory, permission, a device, an optional package."""

    exit_code = 6


class TargetError(CompressError):
    """The output folder is not ours to write, or another run is writing it."""

    exit_code = 7


class CalibrationError(CompressError):
    """A method could not solve a layer: no data reached it, or its statistic is unusable."""

    exit_code = 8


class VerificationError(CompressError):
    """What was written is not what was meant."""

    exit_code = 9


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known word, or lists the known words when none is near."""
    words = sorted(known)
    near = difflib.get_close_matches(name, words, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known: {', '.join(words)}" if words else ""
