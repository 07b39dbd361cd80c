"""How a command speaks, and how a recipe that it made is started.

Torch is imported inside the functions that need it, never to show a help page.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli.flags import model_flags
from compress.cli.render import reporter_for
from compress.cli.tables import measured_document, plan_text, result_text
from compress.core.errors import UsageError
from compress.core.events import Reporter
from compress.core.launch import launch
from compress.core.recipe import Data, Recipe

RUN_FIELDS = ("task", "seed", "device", "threads", "trust_remote_code")
"""Fields of `Recipe` that every command which runs something offers as flags."""
DATA_FIELDS = ("calibration", "samples", "sequence_length", "batch_size", "activations_memory")
"""Fields of `Data` that every such command offers."""
TRAINING_FIELDS = ("train", "validation")
"""Fields of `Data` that commands offer which may train."""
LOG_FIELDS = ("log",)
"""Fields of `Recipe` that every such command offers."""
TRAINING_FLAGS = (
    *model_flags(Data, "Training", TRAINING_FIELDS),
    *model_flags(Recipe, "Training", LOG_FIELDS),
)
RUN_FLAGS = (*model_flags(Data, "Calibration", DATA_FIELDS), *model_flags(Recipe, "Run", RUN_FIELDS))


def _switch(flag: str, text: str, section: str) -> Any:
    return typer.Option(flag, help=text, rich_help_panel=section)


Debug = Annotated[bool, _switch("--debug", "show the traceback of an error", "Output")]


@dataclass(frozen=True)
class Output:
    """The flags that say how a command speaks."""

    json: Annotated[bool, _switch("--json", "JSON lines on standard output", "Output")] = False
    quiet: Annotated[bool, _switch("--quiet", "say nothing but errors", "Output")] = False
    debug: Debug = False

    def reporter(self) -> Reporter:
        """The reporter that the flags ask for."""
        return reporter_for(machine=self.json, quiet=self.quiet)

    def say(self, text: str, document: Any) -> None:
        """Print a result on standard output: for people, or as one JSON document."""
        if self.json:
            typer.echo(json.dumps(document, default=str))
        elif not self.quiet:
            typer.echo(text)


@dataclass(frozen=True)
class RunChoice:
    """What the flags of a run say, apart from the recipe."""

    fresh: Annotated[bool, _switch("--fresh", "start over instead of resuming or reusing", "Run")] = False
    plan: Annotated[bool, _switch("--plan", "check and predict, and start nothing", "Run")] = False
    print_recipe: Annotated[bool, _switch("--print-recipe", "print the recipe and stop", "Run")] = False


def start(recipe: Recipe, out: Path | None, choice: RunChoice, output: Output, *, single: bool) -> int:
    """Print, plan or run a recipe, as the flags say; returns the exit code.

    Args:
        recipe: what to run.
        out: folder of the result.
        choice: whether to print, to plan or to run.
        output: how to speak of it.
        single: the folder is the artifact of the only step; otherwise it holds one folder a step.
    """
    here = launch()
    if not here.leads and (choice.print_recipe or choice.plan):
        return 0
    if choice.print_recipe:
        typer.echo(recipe.dump(), nl=False)
        return 0
    if out is None and not choice.plan:
        raise UsageError(
            f"'compress {recipe.steps[0].use.replace('.', ' ')}' needs --out DIR",
            "name the folder of the result, or give --plan",
        )
    from compress import engine

    if choice.plan:
        plan = engine.plan(recipe, out, reporter=output.reporter(), fresh=choice.fresh, single=single)
        rows = plan.describe()
        output.say(plan_text(rows), {"event": "plan", "steps": rows})
        return 0
    result = engine.run(recipe, out, reporter=output.reporter(), fresh=choice.fresh, single=single)
    if not here.leads:
        return result.exit_code
    document = {
        "event": "result",
        "final": str(result.final),
        "artifacts": [str(path) for path in result.artifacts],
        "did_nothing": result.did_nothing,
        **({} if result.results is None else measured_document(result.results)),
        "exit_code": result.exit_code,
    }
    output.say(result_text(result), document)
    return result.exit_code
