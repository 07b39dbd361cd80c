"""Every failure is one line, a hint and an exit code."""

import errno

import pytest
import typer

from compress.cli.failures import debugging, explain, show
from compress.cli.render import ReaderLeft
from compress.core.errors import PlanError, VerificationError


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (PlanError("needs float weights", "put it before"), "needs float weights", 5),
        (VerificationError("a weight differs"), "a weight differs", 9),
        (KeyboardInterrupt(), "interrupted", 130),
        (typer.Abort(), "interrupted", 130),
        (BrokenPipeError(), "", 141),
        (MemoryError(), "the memory is used up", 6),
        (OSError(errno.ENOSPC, "No space left on device", "/full/file"), "the disk is full: /full/file", 6),
        (PermissionError(errno.EACCES, "Permission denied", "/etc/x"), "no permission: /etc/x", 6),
        (OSError(errno.EROFS, "Read-only file system"), "the file system is read-only", 6),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full", 6),
        (RuntimeError("odd"), "internal error: RuntimeError: odd", 1),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), "internal error: FileNotFoundError", 1),
        (typer.BadParameter("bad file."), "Invalid value: bad file", 2),
    ],
)
def test_what_is_said_and_with_which_code(error: BaseException, message: str, code: int) -> None:
    failure = explain(error)
    assert failure.message.startswith(message)
    assert failure.exit_code == code
    # Where something is said, it also says what to do, unless the error itself has no remedy.
    assert failure.hint or not failure.message or isinstance(error, VerificationError | typer.TyperException)


def test_a_device_out_of_memory_is_told_by_its_name() -> None:
    class OutOfMemoryError(RuntimeError):
        """As torch names it; torch is not imported to compare with it."""

    assert explain(OutOfMemoryError("CUDA out of memory")).exit_code == 6


def test_it_is_printed_on_standard_error_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert show(RuntimeError("a\nlibrary's\n  essay"), debug=False) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "error: internal error: RuntimeError: a library's essay",
        "hint: run again with --debug and report what it prints",
    ]


@pytest.mark.parametrize("error", [BrokenPipeError(), ReaderLeft()])
def test_a_broken_pipe_says_nothing(error: Exception) -> None:
    assert explain(error).message == ""
    assert explain(error).exit_code == 141


def test_debug_shows_the_traceback_before_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise PlanError("wrong", "mend it")
    except PlanError as error:
        show(error, debug=True)
    text = capsys.readouterr().err
    assert text.startswith("Traceback")
    assert text.endswith("error: wrong\nhint: mend it\n")


@pytest.mark.parametrize(
    ("words", "variable", "expected"),
    [(["run"], "", False), (["run", "--debug"], "", True), (["run"], "1", True), (["run"], "0", False)],
)
def test_when_tracebacks_are_asked_for(
    words: list[str], variable: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESS_DEBUG", variable)
    assert debugging(words) is expected
