"""A command made from a pass: its fields are the flags, its docstrings the help page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli.flags import FlagCommand, model_flags, part, spelling, with_flags
from compress.cli.start import (
    DATA_FIELDS,
    LOG_FIELDS,
    RUN_FIELDS,
    RUN_FLAGS,
    TRAINING_FIELDS,
    TRAINING_FLAGS,
    Output,
    RunChoice,
    start,
)
from compress.core.errors import CompressError
from compress.core.facts import MEANING, Fact
from compress.core.passes import Pass, build, find
from compress.core.recipe import Recipe
from compress.training.trainer import Trainer

MODEL = "a folder, a hub id or builtin:NAME"
"""What may be given as a model."""


def application(name: str) -> typer.Typer:
    """The command of a method, as an application of one command.

    Args:
        name: registered name, such as ``quantize.gptq``.

    Raises:
        UsageError: no method has this name.
        PlanError: the method cannot be imported or breaks the contract of passes.
    """
    method = find(name)
    made = typer.Typer(add_completion=False, rich_markup_mode=None)

    @made.command(
        name.partition(".")[2],
        cls=FlagCommand,
        help=description(method),
        short_help=method.summary,
        epilog=epilog(name, method),
        options_metavar="--out DIR [FLAGS]",
    )
    @with_flags(
        *model_flags(method, "Method"),
        *RUN_FLAGS,
        *(TRAINING_FLAGS if issubclass(method, Trainer) else ()),
    )
    def run(
        model: Annotated[str, typer.Argument(help=MODEL)],
        choice: RunChoice,
        output: Output,
        out: Annotated[
            Path | None, typer.Option(metavar="DIR", help="folder of the result", rich_help_panel="Run")
        ] = None,
        **given: Any,
    ) -> int:
        return start(recipe_of(name, model, given), out, choice, output, single=True)

    return made


def recipe_of(name: str, model: str, given: Mapping[str, Any]) -> Recipe:
    """The one-step recipe that a method command stands for.

    Args:
        name: registered name of the method.
        model: the source.
        given: values of flags, by field, of the method and of the run.

    Raises:
        UsageError: a value does not fit.
    """
    options = part(given, find(name).model_fields)
    # A complaint about a flag of the method is made in the method's name, not in that of a step.
    build(name, options)
    return Recipe.of(
        {
            "model": model,
            "data": part(given, (*DATA_FIELDS, *TRAINING_FIELDS)),
            "steps": [{"use": name, **options}],
            **part(given, (*RUN_FIELDS, *LOG_FIELDS)),
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
    lines = [summary]
    if method.calibrated:
        lines.append("Reads calibration text: give --calibration TEXT.")
    elif method.calibrated_with:
        options = " or ".join(
            f"{spelling(option, method.model_fields[option])} {value}"
            for option, values in method.calibrated_with.items()
            for value in sorted(values)
        )
        lines.append(f"Reads calibration text with {options}: give --calibration TEXT.")
    if issubclass(method, Trainer):
        lines.append("Reads training text: give --train TEXT.")
    facts = [f"Needs {_facts(method.needs)}."] if method.needs else []
    if method.needs_one_of:
        facts.append(f"Needs one of: {_facts(method.needs_one_of)}.")
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
    if issubclass(method, Trainer):
        lines.append("Several GPUs or processes:")
        lines.append(f"  torchrun --nproc-per-node N -m compress {family} {short} MODEL --out DIR ...")
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
