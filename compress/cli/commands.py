"""The commands that are not methods: run, bench, inspect, verify, methods, schema.

Torch is imported inside the functions that need it, never to show a help page.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from compress.cli import from_pass
from compress.cli.flags import (
    DATA_FIELDS,
    RUN_FIELDS,
    Flag,
    FlagCommand,
    RunChoice,
    given,
    model_flags,
    output_flags,
    run_flags,
)
from compress.cli.render import reporter_for
from compress.cli.tables import (
    measured_document,
    measured_text,
    nested_text,
    plan_text,
    result_text,
    table,
    verification_text,
)
from compress.core.errors import UsageError
from compress.core.events import Reporter
from compress.core.gate import Gate
from compress.core.passes import names
from compress.core.recipe import Bench, Recipe, schema

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
RUNS = Path("runs")
"""Where `compress run` writes when it is not told."""


def reporter_of(ctx: click.Context) -> Reporter:
    """The reporter that the command's flags ask for."""
    return reporter_for(machine=ctx.params["json"], quiet=ctx.params["quiet"])


def say(ctx: click.Context, text: str, document: Any) -> None:
    """Print a result on standard output: for people, or as one JSON document."""
    if ctx.params["json"]:
        click.echo(json.dumps(document, default=str))
    elif not ctx.params["quiet"]:
        click.echo(text)


def start(ctx: click.Context, recipe: Recipe, out: Path | None, *, single: bool) -> int:
    """Print, plan or run a recipe, as the flags say; returns the exit code.

    Args:
        ctx: the parsed command.
        recipe: what to run.
        out: folder of the result.
        single: the folder is the artifact of the only step; otherwise it holds one folder a step.
    """
    choice = RunChoice.of(ctx)
    if choice.print_recipe:
        click.echo(recipe.dump(), nl=False)
        return 0
    if out is None and not choice.plan:
        raise UsageError(
            f"'{ctx.command_path}' needs --out DIR", "name the folder of the result, or give --plan"
        )
    from compress import engine

    plan = engine.plan(recipe, out, reporter=reporter_of(ctx), fresh=choice.fresh, single=single)
    if choice.plan:
        rows = plan.describe()
        say(ctx, plan_text(rows), {"event": "plan", "steps": rows})
        return 0
    result = engine.execute(plan)
    document = {
        "event": "result",
        "final": str(result.final),
        "artifacts": [str(path) for path in result.artifacts],
        "did_nothing": result.did_nothing,
        **({} if result.results is None else measured_document(result.results)),
        "exit_code": result.exit_code,
    }
    say(ctx, result_text(result), document)
    return result.exit_code


def run_command() -> click.Command:
    """``compress run``: a whole recipe."""

    def invoked(**_: Any) -> int:
        ctx = click.get_current_context()
        path = Path(ctx.params["recipe"])
        recipe = Recipe.load(path, settings=_settings(ctx))
        out = Path(ctx.params["out"]) if ctx.params["out"] else RUNS / path.stem
        return start(ctx, recipe, out, single=False)

    return FlagCommand(
        "run",
        options_metavar="[FLAGS]",
        params=[
            click.Argument(["recipe"]),
            Flag(
                ["--model"], metavar="MODEL", help="source model, instead of the recipe's", section="Recipe"
            ),
            Flag(
                ["--set", "settings"],
                metavar="PATH=VALUE",
                multiple=True,
                help="change an entry of the recipe, such as steps.0.bits=3 (may be repeated)",
                section="Recipe",
            ),
            Flag(["--out"], metavar="DIR", help=f"folder of the run [default: {RUNS}/NAME]", section="Run"),
            *run_flags(),
            *output_flags(),
        ],
        callback=invoked,
        help="Run a recipe: compress, verify, and report before and after.\n\n"
        "RECIPE is a YAML file. The folder of the run gets one folder a step, report.md and results.json. "
        "A second run does nothing; a changed step redoes only what follows it.",
        short_help="run a recipe: compress, verify, report",
        context_settings=SETTINGS,
    )


def bench_command() -> click.Command:
    """``compress bench``: one paired experiment."""
    from compress.bench.options import Options

    def invoked(**_: Any) -> int:
        ctx = click.get_current_context()
        from compress.bench.experiment import compare
        from compress.models.source import resolve

        results = compare(
            resolve(ctx.params["before"]),
            [resolve(model) for model in ctx.params["after"]],
            Path(ctx.params["out"]),
            ctx.params["text"],
            task=ctx.params["task"] or "auto",
            runtimes=ctx.params["runtimes"] or Bench().runtimes,
            gates=tuple(Gate.of(gate) for gate in ctx.params["gates"]),
            reporter=reporter_of(ctx),
            options=Options.of(given(ctx, Options.model_fields)),
        )
        document = {"event": "result", "folder": ctx.params["out"], **measured_document(results)}
        say(ctx, measured_text(results), {**document, "exit_code": results.exit_code})
        return results.exit_code

    return FlagCommand(
        "bench",
        options_metavar="--out DIR --text TEXT [FLAGS]",
        params=[
            click.Argument(["before"]),
            click.Argument(["after"], nargs=-1, required=True),
            Flag(["--out"], metavar="DIR", required=True, help="folder of the report", section="Run"),
            Flag(["--text"], metavar="TEXT", required=True, help="text to measure on", section="Run"),
            *model_flags(Recipe, "Run", ["task"]),
            *model_flags(Recipe, "Experiment", ["gates"]),
            *model_flags(Bench, "Experiment", ["runtimes"]),
            *model_flags(Options, "Experiment"),
            *output_flags(),
        ],
        callback=invoked,
        help="Measure BEFORE and every AFTER in one experiment: size, speed, memory and accuracy.\n\n"
        "Exit code 10 says that a gate failed, 11 that one is undecided, 12 that one could not be judged.",
        short_help="measure size, speed, memory and accuracy, before and after",
        epilog="Example:\n"
        "  compress bench MODEL RESULT --out DIR --text TEXT --gate size.bytes:test=bound,at_most=50%",
        context_settings=SETTINGS,
    )


def inspect_command() -> click.Command:
    """``compress inspect``: what an artifact is and where it comes from."""

    def invoked(**_: Any) -> int:
        ctx = click.get_current_context()
        from compress import engine

        document = engine.inspect(Path(ctx.params["artifact"]))
        say(ctx, nested_text(document), document)
        return 0

    return FlagCommand(
        "inspect",
        options_metavar="[FLAGS]",
        params=[click.Argument(["artifact"]), *output_flags()],
        callback=invoked,
        help="Show what a model folder holds and how it was made, without reading a weight.",
        short_help="show what a model folder holds and how it was made",
        context_settings=SETTINGS,
    )


def verify_command() -> click.Command:
    """``compress verify``: whether an artifact still holds what was meant."""

    def invoked(**_: Any) -> int:
        ctx = click.get_current_context()
        from compress import engine

        report = engine.verify(
            Path(ctx.params["artifact"]),
            reporter=reporter_of(ctx),
            trust_remote_code=ctx.params["trust_remote_code"],
        )
        say(ctx, verification_text(report), {"event": "verified", **asdict(report)})
        return 0

    return FlagCommand(
        "verify",
        options_metavar="[FLAGS]",
        params=[
            click.Argument(["artifact"]),
            *model_flags(Recipe, "Run", ["trust_remote_code"]),
            *output_flags(),
        ],
        callback=invoked,
        help="Load an artifact as its users will and compare every weight with what was meant.",
        short_help="compare every loaded weight with what was meant",
        context_settings=SETTINGS,
    )


def methods_command() -> click.Command:
    """``compress methods``: every registered method."""

    def invoked(**_: Any) -> int:
        ctx = click.get_current_context()
        rows = [(name, from_pass.title(name)) for name in names()]
        document = [{"name": name, "summary": summary} for name, summary in rows]
        say(ctx, table(("method", "what it does"), rows), {"event": "methods", "methods": document})
        return 0

    return FlagCommand(
        "methods",
        options_metavar="[FLAGS]",
        params=output_flags(),
        callback=invoked,
        help="List every method, ours and those of installed packages.",
        short_help="list every method",
        context_settings=SETTINGS,
    )


def schema_command() -> click.Command:
    """``compress schema``: the JSON schema of recipes."""

    def invoked(**_: Any) -> int:
        click.echo(json.dumps(schema(), indent=2))
        return 0

    return FlagCommand(
        "schema",
        options_metavar="",
        params=[Flag(["--debug"], is_flag=True, help="show the traceback of an error", section="Output")],
        callback=invoked,
        help="Print the JSON schema of recipes, with the options of every method; for editors and checks.",
        short_help="print the JSON schema of recipes",
        context_settings=SETTINGS,
    )


def _settings(ctx: click.Context) -> list[str]:
    """All that the command line changes in a recipe; a value in JSON is a value in YAML."""
    flags = {
        **given(ctx, ["model"]),
        **given(ctx, RUN_FIELDS),
        **{f"data.{name}": value for name, value in given(ctx, DATA_FIELDS).items()},
    }
    return [
        *(f"{path}={json.dumps(value)}" for path, value in flags.items()),
        *ctx.params["settings"],
    ]
