"""What a failure looks like to the person who typed the command: one line, a hint, an exit code.

A traceback appears only with ``--debug`` (or ``COMPRESS_DEBUG=1``), also for errors that are ours: a
pipeline's log needs the line, a report to us needs the traceback, nobody needs both by surprise.
"""

import errno
import os
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import typer

from compress.cli.flags import spoken
from compress.cli.render import ReaderLeft
from compress.core.errors import CompressError, EnvironmentFault, UsageError, did_you_mean

INTERRUPTED = 130
BROKEN_PIPE = 141
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
_LACKING = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "the file system is read-only",
    errno.ENOMEM: "the memory is used up",
    errno.EMFILE: "too many open files",
}


@dataclass(frozen=True)
class Failure:
    """What to print and with which code to leave.

    Attributes:
        message: what came and what was expected; empty where nothing is to be said.
        hint: what to do.
        exit_code: of the process.
    """

    message: str
    hint: str
    exit_code: int


def debugging(arguments: Sequence[str]) -> bool:
    """Whether tracebacks are asked for; looked up before parsing, so that it holds for a bad command too."""
    return "--debug" in arguments or os.environ.get("COMPRESS_DEBUG", "") not in ("", "0")


def explain(error: BaseException) -> Failure:
    """The one line, the hint and the exit code of any exception."""
    if isinstance(error, CompressError):
        return Failure(error.message, error.hint, error.exit_code)
    if isinstance(error, typer.Abort | KeyboardInterrupt):
        return Failure("interrupted", "run the same command again to resume", INTERRUPTED)
    if isinstance(error, typer.TyperException):
        return _of_command(error)
    if isinstance(error, BrokenPipeError | ReaderLeft):
        return Failure("", "", BROKEN_PIPE)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Failure(
            f"the memory is used up: {error}" if str(error) else "the memory is used up",
            "give smaller --batch-size or --sequence-length, or another --device; --plan predicts the need",
            EnvironmentFault.exit_code,
        )
    number = _system_error(error)
    if number in _LACKING:
        place = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return Failure(
            f"{_LACKING[number]}{place}",
            "make room or choose another folder, then run the same command again to resume",
            EnvironmentFault.exit_code,
        )
    return Failure(
        f"internal error: {type(error).__name__}: {error}",
        "run again with --debug and report what it prints",
        CompressError.exit_code,
    )


def show(error: BaseException, *, debug: bool) -> int:
    """Print a failure to standard error; returns the exit code."""
    failure = explain(error)
    if failure.exit_code == BROKEN_PIPE:
        # What is left in the buffer has nowhere to go; the interpreter would complain about it at its end.
        _mute()
        return BROKEN_PIPE
    if debug and not isinstance(error, typer.TyperException | typer.Abort | KeyboardInterrupt):
        traceback.print_exception(error, file=sys.stderr)
    if failure.message:
        # One line each, whatever a library put into its message.
        typer.echo(f"error: {' '.join(failure.message.split())}", err=True)
    if failure.hint:
        typer.echo(f"hint: {failure.hint}", err=True)
    return failure.exit_code


def _mute() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _system_error(error: BaseException) -> int | None:
    """The number of the operating system's error, also where a library written in Rust spells it out."""
    if isinstance(error, OSError):
        return error.errno
    spelled = _RUST_ERROR.search(str(error))
    return int(spelled[1]) if spelled else None


def _of_command(error: typer.TyperException) -> Failure:
    """A failure of the command line itself, in our words."""
    # The kinds of these errors have no public names in Typer; told apart by what they carry and are called.
    kind = type(error).__name__
    ctx: typer.Context | None = getattr(error, "ctx", None)
    message, hint = error.format_message().rstrip("."), ""
    if ctx is not None:
        hint = f"see {ctx.command_path} --help"
        if kind == "NoSuchOption":
            flag = getattr(error, "option_name", "")
            message = f"unknown flag '{flag}' for '{ctx.command_path}'"
            parameters = ctx.command.get_params(ctx)
            words = [
                word for parameter in parameters for word in (*parameter.opts, *parameter.secondary_opts)
            ]
            near = did_you_mean(flag, [word for word in words if word.startswith("--")])
            hint = near if near.startswith("did you mean") else hint
        elif kind == "MissingParameter" and isinstance(error, typer.BadParameter) and error.param is not None:
            message = f"'{ctx.command_path}' needs {spoken(error.param)}"
    return Failure(message, hint, UsageError.exit_code)
