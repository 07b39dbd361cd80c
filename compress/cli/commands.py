"""The commands that are not methods: run, bench, convert, inspect, verify, methods, schema.

Torch is imported inside the functions that need it, never to show a help page.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli import conversion, from_pass
from compress.cli.flags import FlagCommand, model_flags, part, with_flags
from compress.cli.start import (
    DATA_FIELDS,
    LOG_FIELDS,
    RUN_FIELDS,
    RUN_FLAGS,
    TRAINING_FIELDS,
    TRAINING_FLAGS,
    Debug,
    Output,
    RunChoice,
    start,
)
from compress.cli.tables import (
    examination_text,
    measured_document,
    measured_text,
    nested_text,
    table,
    verification_text,
)
from compress.core.bench import Bench
from compress.core.errors import EnvironmentFault, UsageError
from compress.core.gate import Gate
from compress.core.passes import names
from compress.core.recipe import Recipe, schema

RUNS = Path("runs")
"""Where `compress run` writes when it is not told."""

Artifact = Annotated[Path, typer.Argument(help="a model folder")]

GatesFile = Annotated[
    Path | None,
    typer.Option(
        "--gates", metavar="FILE", help="gates in YAML: a list, or a recipe's", rich_help_panel="Experiment"
    ),
]

fixed = typer.Typer()


def gates_of(file: Path | None) -> tuple[Gate, ...]:
    """The gates of a file, where one was given."""
    return () if file is None else Gate.load(file)


@fixed.command(
    cls=FlagCommand, options_metavar="[FLAGS]", short_help="run a recipe: compress, verify, report"
)
@with_flags(*RUN_FLAGS, *TRAINING_FLAGS)
def run(
    recipe: Annotated[Path, typer.Argument(help="a YAML file")],
    choice: RunChoice,
    output: Output,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="source model, instead of the recipe's", rich_help_panel="Recipe"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="change an entry of the recipe, such as steps.0.bits=3 (may be repeated)",
            rich_help_panel="Recipe",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help=f"folder of the run [default: {RUNS}/NAME]", rich_help_panel="Run"),
    ] = None,
    **given: Any,
) -> int:
    """Run a recipe: compress, verify, and report before and after.

    The folder of the run gets one folder a step, report.md and results.json. A second run does nothing;
    a changed step redoes only what follows it.
    """
    flags = {
        **({} if model is None else {"model": model}),
        **part(given, (*RUN_FIELDS, *LOG_FIELDS)),
        **{f"data.{name}": value for name, value in part(given, (*DATA_FIELDS, *TRAINING_FIELDS)).items()},
    }
    # A value in JSON is a value in YAML.
    changes = [f"{path}={json.dumps(value)}" for path, value in flags.items()]
    loaded = Recipe.load(recipe, settings=[*changes, *(settings or [])])
    return start(loaded, out or RUNS / recipe.stem, choice, output, single=False)


@fixed.command(
    cls=FlagCommand,
    options_metavar="--out DIR --text TEXT [FLAGS]",
    short_help="measure size, speed, memory and accuracy, before and after",
    epilog="Example:\n"
    "  compress bench MODEL RESULT --out DIR --text TEXT --gate size.bytes:test=bound,at_most=50%",
)
@with_flags(
    *model_flags(Recipe, "Run", ["task"]),
    *model_flags(Recipe, "Experiment", ["gates"]),
    *model_flags(Bench, "Experiment"),
)
def bench(
    before: Annotated[str, typer.Argument(help=f"the original: {from_pass.MODEL}")],
    after: Annotated[list[str], typer.Argument(help="what was made of it")],
    output: Output,
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder of the report", rich_help_panel="Run")],
    text: Annotated[str, typer.Option(metavar="TEXT", help="text to measure on", rich_help_panel="Run")],
    gates_file: GatesFile = None,
    **given: Any,
) -> int:
    """Measure BEFORE and every AFTER in one experiment: size, speed, memory and accuracy.

    Exit code 10 says that a gate failed, 11 that one is undecided, 12 that one could not be judged, 13
    that BEFORE has nothing to judge by.
    """
    from compress.bench.experiment import compare
    from compress.models.source import resolve

    results = compare(
        resolve(before),
        [resolve(model) for model in after],
        out,
        text,
        task=given.get("task", "auto"),
        gates=(*gates_of(gates_file), *(Gate.of(gate) for gate in given.get("gates", ()))),
        reporter=output.reporter(),
        options=Bench.of(part(given, Bench.model_fields)),
    )
    document = {"event": "result", "folder": str(out), **measured_document(results)}
    output.say(measured_text(results), {**document, "exit_code": results.exit_code})
    return results.exit_code


@fixed.command(
    "bench verdict",
    cls=FlagCommand,
    options_metavar="[FLAGS]",
    short_help="judge a stored bench again, by other gates",
    epilog="Example:\n  compress bench verdict REPORT/results.json --gates gates.yaml",
)
@with_flags(*model_flags(Recipe, "Experiment", ["gates"]))
def bench_verdict(
    results: Annotated[Path, typer.Argument(help="a results.json of `compress bench`")],
    output: Output,
    gates_file: GatesFile = None,
    **given: Any,
) -> int:
    """Judge the samples of a stored bench by other gates; nothing is measured, and no file changes.

    The exit codes are those of `compress bench`.
    """
    from compress.bench.judging import judge_again
    from compress.bench.results import Results

    gates = (*gates_of(gates_file), *(Gate.of(gate) for gate in given.get("gates", ())))
    if not gates:
        raise UsageError("no gate is given", "name a file with --gates, or one gate with --gate")
    judged = judge_again(Results.read(results), gates)
    document = {"event": "result", **measured_document(judged)}
    output.say(measured_text(judged), {**document, "exit_code": judged.exit_code})
    return judged.exit_code


@fixed.command(
    cls=FlagCommand,
    options_metavar="--to FORMAT --out DIR [FLAGS]",
    short_help="write a model in the format of another engine, nothing rounded",
    epilog="Examples:\n"
    "  compress convert MODEL --to gptq --out DIR\n"
    "  compress convert MODEL --to awq --out DIR --plan\n"
    "  compress convert MODEL --to gguf --out DIR --type f16\n"
    "  compress convert MODEL --to compressed-tensors --out DIR\n"
    "  compress convert MODEL --to onnx --out DIR --accuracy-level 0",
)
@with_flags(*conversion.FLAGS, *model_flags(Recipe, "Run", RUN_FIELDS))
def convert(
    model: Annotated[str, typer.Argument(help=from_pass.MODEL)],
    to: Annotated[str, typer.Option(metavar=conversion.METAVAR, help="the format", rich_help_panel="Method")],
    choice: RunChoice,
    output: Output,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="folder of the result", rich_help_panel="Run")
    ] = None,
    **given: Any,
) -> int:
    """Write a model in the format of another engine: the same integers, or the same floats.

    Integers are those that a quantize pass made. What a format cannot hold exactly is refused, with the
    layer's name. It is the export method of the format (`--print-recipe` shows it), run the same way.
    """
    return start(conversion.recipe_of(to, model, given), out, choice, output, single=True)


@fixed.command(
    cls=FlagCommand,
    options_metavar="[FLAGS]",
    short_help="continue a prompt with any model folder",
    epilog='Example:\n  compress generate MODEL "Once upon a time" --max-new-tokens 64',
)
@with_flags(*model_flags(Recipe, "Run", ["device", "seed", "threads", "trust_remote_code"]))
def generate(
    model: Annotated[str, typer.Argument(help=from_pass.MODEL)],
    prompt: Annotated[str, typer.Argument(help="what to continue, or to answer with --chat")],
    output: Output,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="INTEGER", help="tokens at most", rich_help_panel="Generation")
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option(
            metavar="NUMBER",
            help="0 takes the likeliest token, more draws among the likely ones",
            rich_help_panel="Generation",
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="NUMBER",
            help="draw only from the likeliest tokens that together have this probability",
            rich_help_panel="Generation",
        ),
    ] = 1.0,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="say the prompt as a user's turn, in the model's chat template",
            rich_help_panel="Generation",
        ),
    ] = False,
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="runtime [default: the first that runs the model]", rich_help_panel="Run"
        ),
    ] = None,
    **given: Any,
) -> int:
    """Continue a prompt, token by token as they are chosen, with any model: float, quantized or ONNX.

    It ends where the model ends its text (generation_config.json), or after --max-new-tokens.
    """
    from compress.engine.generation import Choice, Writing

    writing = Writing.open(
        model,
        prompt,
        Choice(temperature, top_p, given.get("seed", 0)),
        limit=max_new_tokens,
        chat=chat,
        runtime=runtime,
        device=given.get("device", "auto"),
        threads=given.get("threads"),
        trust_remote_code=given.get("trust_remote_code", False),
    )
    pieces = []
    for piece in writing.pieces():
        pieces.append(piece)
        if not (output.json or output.quiet):
            typer.echo(piece, nl=False)
    document = {"event": "generated", "prompt": prompt, "text": "".join(pieces), **writing.facts()}
    # What people read has been written already, but for the end of the line.
    output.say("", document)
    return 0


@fixed.command(
    cls=FlagCommand,
    options_metavar="[FLAGS]",
    short_help="show what a model folder holds and how it was made",
)
@with_flags()
def inspect(artifact: Artifact, output: Output) -> int:
    """Show what a model folder holds and how it was made, without reading a weight."""
    from compress import engine

    document = engine.inspect(artifact)
    output.say(nested_text(document), document)
    return 0


@fixed.command(
    cls=FlagCommand, options_metavar="[FLAGS]", short_help="compare every loaded weight with what was meant"
)
@with_flags(*model_flags(Recipe, "Run", ["trust_remote_code"]))
def verify(artifact: Artifact, output: Output, **given: Any) -> int:
    """Load an artifact as its users will and compare every weight with what was meant."""
    from compress import engine

    report = engine.verify(artifact, reporter=output.reporter(), **given)
    output.say(verification_text(report), {"event": "verified", **asdict(report)})
    return 0


@fixed.command(
    cls=FlagCommand,
    options_metavar="[FLAGS]",
    short_help="show what this machine has, and what is missing for what",
)
@with_flags()
def doctor(output: Output) -> int:
    """Show what this machine has, what each extra adds, and what is missing for what.

    Nothing is installed or downloaded. Exit code 6 says that a required package is missing or too old.
    """
    from compress import engine

    chapters = engine.examine()
    document = {name: [asdict(each) for each in findings] for name, findings in chapters.items()}
    output.say(examination_text(chapters), {"event": "examined", **document})
    wrong = any(each.state == "wrong" for findings in chapters.values() for each in findings)
    return EnvironmentFault.exit_code if wrong else 0


@fixed.command(cls=FlagCommand, options_metavar="[FLAGS]", short_help="list every method")
@with_flags()
def methods(output: Output) -> int:
    """List every method, ours and those of installed packages."""
    rows = [(name, from_pass.title(name)) for name in names()]
    document = [{"name": name, "summary": summary} for name, summary in rows]
    output.say(table(("method", "what it does"), rows), {"event": "methods", "methods": document})
    return 0


@fixed.command(
    "schema", cls=FlagCommand, options_metavar="[FLAGS]", short_help="print the JSON schema of recipes"
)
def print_schema(_debug: Debug = False) -> int:
    """Print the JSON schema of recipes, with the options of every method; for editors and checks."""
    typer.echo(json.dumps(schema(), indent=2))
    return 0
