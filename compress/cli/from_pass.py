"""A command made from a pass: its fields are the flags, its docstrings the help page."""

from pathlib import Path
from typing import Any, Protocol

import click

from compress.cli.flags import (
    DATA_FIELDS,
    RUN_FIELDS,
    Flag,
    FlagCommand,
    given,
    model_flags,
    output_flags,
    run_flags,
)
from compress.core.errors import CompressError
from compress.core.facts import MEANING, Fact
from compress.core.passes import Pass, build, find
from compress.core.recipe import Recipe


class Start(Protocol):
    """What a method command calls when its recipe is made."""

    def __call__(self, ctx: click.Context, recipe: Recipe, out: Path | None, *, single: bool) -> int:
        """Run the recipe; returns the exit code."""


def command(name: str, start: Start) -> click.Command:
    """The command of a method.

    Args:
        name: registered name, such as ``quantize.gptq``.
        start: runs the one-step recipe that the command builds.

    Raises:
        UsageError: no method has this name.
        PlanError: the method cannot be imported or breaks the contract of passes.
    """
    method = find(name)

    def invoked(**_: Any) -> int:
        ctx = click.get_current_context()
        out = ctx.params["out"]
        return start(ctx, recipe_of(name, ctx), None if out is None else Path(out), single=True)

    return FlagCommand(
        name.partition(".")[2],
        params=[
            click.Argument(["model"]),
            *model_flags(method, "Method"),
            Flag(["--out"], metavar="DIR", help="folder of the result", section="Run"),
            *run_flags(),
            *output_flags(),
        ],
        callback=invoked,
        help=description(method),
        short_help=method.summary,
        epilog=epilog(name, method),
        options_metavar="--out DIR [FLAGS]",
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


def recipe_of(name: str, ctx: click.Context) -> Recipe:
    """The one-step recipe that a parsed method command stands for.

    Raises:
        UsageError: a value does not fit.
    """
    options = given(ctx, find(name).model_fields)
    # A complaint about a flag of the method is made in the method's name, not in that of a step.
    build(name, options)
    return Recipe.of(
        {
            "model": ctx.params["model"],
            "data": given(ctx, DATA_FIELDS),
            "steps": [{"use": name, **options}],
            **given(ctx, RUN_FIELDS),
        },
        source="command",
    )


def title(name: str) -> str:
    """One line about a method, for lists; also when it cannot be imported.

    One broken package must not take the help of the others away; using the method says the same.
    """
    try:
        return find(name).summary
    except CompressError as error:
        return f"cannot be used: {error.message}"


def description(method: type[Pass]) -> str:
    """What a method does, for the top of its help page."""
    summary = method.summary[0].upper() + method.summary[1:].rstrip(".") + "."
    lines = [summary, "MODEL is a folder, a hub id or builtin:NAME."]
    if method.calibrated:
        lines.append("Reads calibration text: give --calibration TEXT.")
    facts = [f"Needs {_facts(method.needs)}."] if method.needs else []
    if method.gives:
        facts.append(f"Gives {_facts(method.gives)}.")
    return "\n\n".join([*lines, " ".join(facts)]).strip()


def epilog(name: str, method: type[Pass]) -> str:
    """Worked examples and the paper, for the foot of a help page."""
    family, _, short = name.partition(".")
    lines = []
    if method.examples:
        lines.append("Examples:")
        lines += [
            f"  compress {family} {short} MODEL --out DIR {flags}".rstrip() for flags in method.examples
        ]
        lines.append("")
    lines.append(f"Recipe:  use: {name}")
    if method.paper is not None:
        paper = method.paper
        by = ", ".join(str(part) for part in (paper.authors, paper.year) if part)
        lines.append(f"Paper:   {paper.title}{f' ({by})' if by else ''}")
        lines.append(f"         {paper.url}")
    return "\n".join(lines)


def _facts(facts: frozenset[Fact]) -> str:
    return " and ".join(MEANING[fact] for fact in sorted(facts))
