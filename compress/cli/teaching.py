"""The commands that prepare a distillation: ``compress teacher ...``.

Torch is imported inside the functions that need it, never to show a help page.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli import from_pass
from compress.cli.flags import FlagCommand, model_flags, part, with_flags
from compress.cli.start import Output
from compress.core.recipe import Recipe
from compress.core.run import TrainingSource
from compress.training.cache_options import CacheOptions

_RUN_FIELDS = ("seed", "device", "threads", "trust_remote_code")

teaching = typer.Typer()


@teaching.command(
    "teacher cache",
    cls=FlagCommand,
    options_metavar="--text TEXT --out DIR [FLAGS]",
    short_help="keep what a model says of a text, for distillations to learn from",
    epilog="Examples:\n"
    "  compress teacher cache TEACHER --text TEXT --tokens 50_000_000 --window 1024 --out CACHE\n"
    "  compress distill logits MODEL --teacher TEACHER --train TEXT --window 1024 --cache CACHE --out DIR",
)
@with_flags(*model_flags(CacheOptions, "Method"), *model_flags(Recipe, "Run", _RUN_FIELDS))
def cache(
    model: Annotated[str, typer.Argument(help=from_pass.MODEL)],
    output: Output,
    text: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="training text, as the runs that will use it name it with --train",
            rich_help_panel="Run",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder of the cache", rich_help_panel="Run")],
    validation: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="text that those runs are judged by; none holds out a part of --text",
            rich_help_panel="Run",
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="start over instead of resuming or reusing", rich_help_panel="Run")
    ] = False,
    **given: Any,
) -> int:
    """Run a teacher over a text once, and keep what it says: its most likely tokens, and the sum of all
    others.

    `compress distill logits --cache DIR` learns from it without running the teacher, as often as is wanted. A
    cache of another teacher, tokenizer, text or window is refused there. A caching that was killed goes on
    from its last complete file.
    """
    from compress import engine

    cached = engine.cache_teacher(
        model,
        TrainingSource(text, validation),
        out,
        CacheOptions.of(part(given, CacheOptions.model_fields)),
        fresh=fresh,
        reporter=output.reporter(),
        **part(given, _RUN_FIELDS),
    )
    said = f"{cached.path}: {cached.tokens:,} tokens, {cached.bytes_a_token:.1f} bytes a token"
    output.say(said, {"event": "cached", **asdict(cached)})
    return 0
