"""Documentation that is made from the code: a page a method, the command line, the recipe's schema.

``python -m compress.cli.docs`` writes the pages below ``docs/``; ``--check`` compares them with what is
there and fails where they differ, so that they cannot rot. Only our own methods have pages there; the
page of another package's method is made the same way, by `method_page`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.core import TyperGroup
from typer.main import get_command

from compress.cli import app
from compress.cli.flags import default_of, entry_type, is_model, metavar, shown, spelling
from compress.core.facts import MEANING
from compress.core.passes import Pass, find, names
from compress.core.recipe import schema

if TYPE_CHECKING:
    from compress.cli.flags import Command, Context

WIDTH = 100
"""Columns of a help page in the documentation."""
MEASURED = ("architectures.md",)
"""Pages among those of the methods that are made by running them, in `benchmarks/`."""
_GENERATED = "<!-- Made by `make docs` from the code; edit the code. -->"


def own_names() -> list[str]:
    """The methods that live in this package, whatever else is installed."""
    package = Path(app.__file__).parent.parent
    return [name for name in names() if (package / Path(*name.split("."))).with_suffix(".py").is_file()]


def pages() -> dict[str, str]:
    """Every generated page: path below the root of the repository, and text."""
    methods = own_names()
    return {
        "docs/cli.md": command_line_page(methods),
        "docs/recipe.schema.json": json.dumps(schema(methods), indent=2) + "\n",
        "docs/methods/README.md": _index(methods),
        **{f"docs/methods/{name}.md": method_page(name) for name in methods},
    }


def method_page(name: str) -> str:
    """The page of one method, in Markdown.

    Raises:
        UsageError: no method has this name.
    """
    method = find(name)
    family, _, short = name.partition(".")
    # What the file says of itself is the explanation; whoever reads the code reads the same.
    explanation = (sys.modules[method.__module__].__doc__ or "").strip()
    parts = [
        _GENERATED,
        f"# {name}",
        f"{method.summary[0].upper()}{method.summary[1:].rstrip('.')}.",
        explanation,
        _facts(method),
        "## Options",
        _options(method),
        *_nested(method),
        "## Use",
        "\n".join(
            [
                "```console",
                *(
                    f"$ compress {family} {short} MODEL --out DIR {flags}".rstrip()
                    for flags in method.examples or ("",)
                ),
                "```",
            ]
        ),
        f"In a recipe:\n\n```yaml\nsteps:\n  - use: {name}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def command_line_page(methods: Sequence[str]) -> str:
    """The help pages of the commands, in Markdown, for these methods."""
    parts = [
        _GENERATED,
        "# The command line",
        "Every command that runs something builds a recipe and goes through the same engine; "
        "`--print-recipe` shows it. Results go to standard output, progress and messages to standard error.",
    ]
    parts += [
        f"{'##' if depth < 2 else '###'} {path}\n\n```text\n{text}\n```"
        for path, depth, text in _help_pages(methods)
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None, root: Path | None = None) -> int:
    """Write the pages, or compare them with ``--check``; returns 1 where a page is not current.

    Args:
        arguments: words of the command line; those of the process by default.
        root: folder that holds ``docs``; the working folder by default.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    base = Path.cwd() if root is None else root
    wanted = {base / path: text for path, text in pages().items()}
    stale = [
        file
        for file in sorted((base / "docs" / "methods").glob("*.md"))
        if file not in wanted and file.name not in MEASURED
    ]
    differing = [
        file
        for file, text in wanted.items()
        if not file.is_file() or file.read_text(encoding="utf-8") != text
    ]
    if "--check" in words:
        for file in (*differing, *stale):
            typer.echo(f"{file.relative_to(base)} is not current: run `make docs`", err=True)
        return 1 if differing or stale else 0
    for file in stale:
        file.unlink()
    for file in differing:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(wanted[file], encoding="utf-8")
        typer.echo(f"wrote {file.relative_to(base)}")
    return 0


def _help_pages(methods: Sequence[str]) -> list[tuple[str, int, str]]:
    """Path, depth and help text of the application and of all commands below it, for these methods."""
    found = []

    def walk(command: "Command | None", name: str, parent: "Context | None", depth: int) -> None:
        if command is None:
            return
        ctx = command.make_context(
            name,
            [],
            parent,
            obj=methods,
            terminal_width=WIDTH,
            max_content_width=WIDTH,
            resilient_parsing=True,
        )
        text = "\n".join(line.rstrip() for line in command.get_help(ctx).splitlines())
        found.append((ctx.command_path, depth, text))
        if isinstance(command, TyperGroup):
            for below in command.list_commands(ctx):
                walk(command.get_command(ctx, below), below, ctx, depth + 1)

    walk(get_command(app.app), "compress", None, 0)
    return found


def _index(methods: Sequence[str]) -> str:
    rows = [f"| [{name}]({name}.md) | {find(name).summary} |" for name in methods]
    matrix = "Which method works on which architecture: [a table](architectures.md)."
    head = [_GENERATED, "", "# Methods", "", matrix, "", "| method | what it does |", "|---|---|"]
    return "\n".join([*head, *rows, ""])


def _facts(method: type[Pass]) -> str:
    lines = []
    for word, facts in (
        ("Needs", method.needs),
        ("Needs one of", method.needs_one_of),
        ("Gives", method.gives),
        ("Takes away", method.breaks),
    ):
        if facts:
            lines.append(f"- {word}: {', '.join(MEANING[fact] for fact in sorted(facts))}")
    lines.append(f"- Reads calibration text: {_calibration(method)}")
    paper = method.paper
    if paper is not None:
        by = ", ".join(str(part) for part in (paper.authors, paper.year) if part)
        lines.append(f"- Paper: [{paper.title}]({paper.url}){f', {by}' if by else ''}")
    return "\n".join(lines)


def _calibration(method: type[Pass]) -> str:
    """Whether a method reads calibration text, and with which options it does so beside."""
    if method.calibrated:
        return "yes"
    with_options = [
        f"with `{option}: {value}`"
        for option, values in method.calibrated_with.items()
        for value in sorted(values)
    ]
    return ", ".join(["no", *([f"but {' or '.join(with_options)}"] if with_options else [])])


def _options(model: type[BaseModel], *, flags: bool = True) -> str:
    if not model.model_fields:
        return "None."
    header = ["option", *(["flag"] if flags else []), "value", "default", "meaning"]
    rows = [_option(name, field, flags=flags) for name, field in model.model_fields.items()]
    return "\n".join([f"| {' | '.join(header)} |", "|---" * len(header) + "|", *rows])


def _option(name: str, field: FieldInfo, *, flags: bool) -> str:
    entry = entry_type(field.annotation)
    value = metavar(field.annotation if entry is None else entry)
    many = " ..." if entry is not None else ""
    default = "required" if field.is_required() else _default(field)
    cells = [f"`{name}`"]
    if flags:
        cells.append(f"`{spelling(name, field)}`")
    cells += [f"`{value}`{many}", default, field.description or ""]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(field: FieldInfo) -> str:
    default = default_of(field)
    return "none" if default is None or default == () else f"`{shown(default)}`"


def _nested(method: type[Pass]) -> list[str]:
    """Tables of the models that options hold."""
    parts = []
    for name, field in method.model_fields.items():
        entry: Any = entry_type(field.annotation) or field.annotation
        if is_model(entry):
            parts.append(f"Each entry of `{name}`:\n\n{_options(entry, flags=False)}")
    return parts


if __name__ == "__main__":
    sys.exit(main())
