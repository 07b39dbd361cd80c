"""The command as a person meets it: help, words it does not know, exit codes, what gets imported."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import compress
from compress.cli import app

HEAVY = ("torch", "transformers", "datasets", "scipy", "numpy", "pandas", "rich")


def run(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "compress", *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_help_lists_and_refusals_import_nothing_heavy() -> None:
    lines = [
        ["--help"],
        ["--version"],
        ["quantize", "--help"],
        ["quantize", "rtn", "--help"],
        ["run", "--help"],
        ["bench", "--help"],
        ["methods"],
        ["schema"],
        ["quantize", "rtn", "some/model", "--print-recipe"],
        ["quantize", "rtn", "some/model", "--bitz", "3"],
    ]
    code = (
        "import sys, json\n"
        "from compress.cli.app import main\n"
        f"for words in {lines!r}:\n"
        "    main(words)\n"
        f"    heavy = [module for module in {HEAVY!r} if module in sys.modules]\n"
        "    print(json.dumps([words, heavy]), file=sys.stderr)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = [json.loads(line) for line in answer.stderr.splitlines() if line.startswith("[[")]
    assert said == [[words, []] for words in lines]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, compress; print([m for m in ({HEAVY!r}) + ('pydantic',) if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_every_public_name_of_the_package_is_there() -> None:
    for name in compress.__all__:
        assert getattr(compress, name) is not None
        assert name in dir(compress)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = compress.no_such_name


def test_help_lists_the_commands_and_only_families_that_have_methods(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert app.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("run", "quantize", "bench", "inspect", "verify", "methods", "schema"):
        assert f"\n  {name} " in text
    families = {name.partition(".")[0] for name in compress.names()}
    assert [family for family in ("prune", "distill", "export", "transform") if f"\n  {family} " in text] == [
        family for family in ("prune", "distill", "export", "transform") if family in families
    ]


def test_no_words_show_the_help_and_fail(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main([]) == 2
    assert "Commands:" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--version"]) == 0
    assert capsys.readouterr().out == f"compress {compress.__version__}\n"


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (["quantise"], "unknown command 'compress quantise'", "did you mean 'quantize'?"),
        (["quantize", "rtm"], "unknown command 'compress quantize rtm'", "did you mean 'rtn'?"),
        (["xyzzy"], "unknown command 'compress xyzzy'", "known: analyze importance, analyze"),
        (["quantize", "rtn", "m", "--bit", "3"], "unknown flag '--bit'", "did you mean '--bits'?"),
        (["quantize", "rtn", "m", "--group_size", "3"], "unknown flag '--group_size'", "'--group-size'"),
        (["quantize", "rtn", "m", "--xyzzy"], "unknown flag '--xyzzy'", "compress quantize rtn --help"),
        (["quantize", "rtn"], "'compress quantize rtn' needs MODEL", "compress quantize rtn --help"),
        (["quantize", "rtn", "m"], "'compress quantize rtn' needs --out DIR", "--plan"),
        (["quantize", "rtn", "m", "--bits", "7", "--out", "x"], "quantize.rtn: bits: Input should be", ""),
        (["quantize", "rtn", "m", "--samples", "few", "--out", "x"], "data.samples: Input should be", ""),
        (["run", "no/such.yaml"], "no recipe at no/such.yaml", "recipes/"),
        (
            ["bench", "m", "--out", "x", "--text", "y"],
            "'compress bench' needs AFTER",
            "compress bench --help",
        ),
        (["bench", "m", "n", "--text", "y"], "'compress bench' needs --out", "compress bench --help"),
        (["--verzion"], "unknown flag '--verzion'", "did you mean '--version'?"),
        (["inspect", "a", "b"], "Got unexpected extra argument(s) (b)", "compress inspect --help"),
    ],
)
def test_a_wrong_command_is_one_line_a_hint_and_exit_code_two(
    words: list[str], error: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0].startswith("error: ")
    assert error in lines[0]
    assert len(lines) <= 2
    assert hint in (lines[1] if len(lines) == 2 else "")


def test_a_family_without_methods_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for known in ("names", "own_names"):
        monkeypatch.setattr(app, known, lambda: ["quantize.rtn"])
    assert app.main(["transform", "rotate"]) == 2
    assert "error: there is no transform method" in capsys.readouterr().err


def test_errors_are_json_too_when_the_log_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["run", "no/such.yaml", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: no recipe at")
    assert json.loads(captured.out) == {
        "event": "error",
        "message": "no recipe at no/such.yaml",
        "hint": "give the path of a YAML file; `recipes/` holds some",
        "exit_code": 2,
    }


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_a_traceback_appears_when_it_is_asked_for(
    how: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMPRESS_DEBUG", raising=False)
    app.main(["run", "no/such.yaml"])
    assert "Traceback" not in capsys.readouterr().err
    if how == "environment":
        monkeypatch.setenv("COMPRESS_DEBUG", "1")
    app.main(["run", "no/such.yaml", *(["--debug"] if how == "flag" else [])])
    assert "Traceback" in capsys.readouterr().err


def test_the_module_is_the_command(tmp_path: Path) -> None:
    answer = run("run", str(tmp_path / "absent.yaml"))
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: no recipe at")


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    pipe = f"{sys.executable} -m compress schema | head -n 1"
    answer = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, check=True)
    assert answer.stdout == "{\n"
    assert "Traceback" not in answer.stderr


def test_a_log_whose_reader_leaves_ends_the_run_quietly() -> None:
    code = (
        "import sys\n"
        "from compress import engine\n"
        "from compress.cli import app\n"
        "def run(recipe, out, *, reporter, **rest):\n"
        "    for number in range(100_000):\n"
        "        reporter.event('block.solve', block=number)\n"
        "engine.run = run\n"
        "sys.exit(app.main(['quantize', 'rtn', 'm', '--out', 'o', '--json']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert json.loads(process.stdout.readline())["event"] == "block.solve"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 141


def test_an_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    # A recipe that is a pipe: the command has started and waits for its text.
    recipe = tmp_path / "recipe.yaml"
    os.mkfifo(recipe)
    code = (
        "import signal, sys\n"
        "from pathlib import Path\n"
        "from compress.cli import app\n"
        # What starts the tests may have had interrupts ignored, and that is inherited.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "Path.is_file = lambda self: True\n"
        f"print('ready', flush=True)\nsys.exit(app.main(['run', {str(recipe)!r}]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    # Opening the pipe for writing returns when the command has opened it for reading.
    with recipe.open("w"):
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-2:] == ["error: interrupted", "hint: run the same command again to resume"]
