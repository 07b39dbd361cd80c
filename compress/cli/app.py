"""The command ``compress``, a Typer application.

Groups of methods come from the registry: one group a family that has methods, one command a method, and
only the module of the method that is asked for gets imported, beside that of the one which ``analyze``
serves. Neither a help page nor a wrong flag imports torch.
"""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, final

import typer
from typer.core import TyperGroup
from typer.main import get_command

from compress import __version__
from compress.cli import analysis, commands, failures, from_pass, teaching
from compress.core.errors import UsageError, did_you_mean
from compress.core.large_pages import ask_for_large_pages
from compress.core.launch import require_alone
from compress.core.passes import FAMILIES, names, own_names

if TYPE_CHECKING:
    from compress.cli.flags import Command, Context, HelpFormatter

_FAMILY_HELP = {
    "transform": "rescale or rotate weights, computing the same",
    "quantize": "turn float weights into integers",
    "prune": "take weights, neurons or layers away",
    "distill": "train a compressed model to follow its original",
    "export": "write the model for another runtime",
}


@final
class Root(TyperGroup):
    """The fixed commands, and the families that have methods."""

    def list_commands(self, ctx: "Context") -> list[str]:
        """The names, in the order in which help shows them."""
        first, *others = (name for name in self.commands if name not in FAMILIES)
        return [first, *(family for family in FAMILIES if _methods(ctx, family)), *others]

    def resolve_command(
        self, ctx: "Context", args: list[str]
    ) -> "tuple[str | None, Command | None, list[str]]":
        """The command of the first word, or of the first two where they name one (``bench verdict``)."""
        both = " ".join(args[:2])
        if len(args) > 1 and both in self.commands:
            return both, self.commands[both], args[2:]
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: "Context", cmd_name: str) -> "Command | None":
        """The command of a name."""
        if cmd_name in self.commands and (cmd_name not in FAMILIES or _own(cmd_name)):
            return super().get_command(ctx, cmd_name)
        known = self.list_commands(ctx)
        if cmd_name in FAMILIES and cmd_name not in known and not ctx.resilient_parsing:
            raise UsageError(f"there is no {cmd_name} method", "`compress methods` lists what there is")
        return super().get_command(ctx, cmd_name) if _knows(ctx, cmd_name, known) else None


@final
class Family(TyperGroup):
    """The methods of a family; the command of each is made when it is asked for."""

    def list_commands(self, ctx: "Context") -> list[str]:
        """The names, in the order in which help shows them."""
        return _methods(ctx, str(self.name))

    def get_command(self, ctx: "Context", cmd_name: str) -> "Command | None":
        """The command of a method."""
        known = cmd_name in _own(str(self.name)) or _knows(ctx, cmd_name, self.list_commands(ctx))
        return get_command(from_pass.application(f"{self.name}.{cmd_name}")) if known else None

    def format_commands(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        """Write the names with one line each, without making the commands."""
        with formatter.section("Commands"):
            methods = self.list_commands(ctx)
            formatter.write_dl([(method, from_pass.title(f"{self.name}.{method}")) for method in methods])


def _own(family: str) -> list[str]:
    """Short names of our own methods of a family: to run one of them, no other package is looked into."""
    return [name.partition(".")[2] for name in own_names() if name.startswith(f"{family}.")]


def _methods(ctx: "Context", family: str) -> list[str]:
    """Short names of the methods of a family: of those that the context brings along, or of all."""
    outermost = ctx.find_root()
    if outermost.obj is None:
        # Once a command line, because it reads the entry points of everything installed.
        outermost.obj = names()
    return [name.partition(".")[2] for name in outermost.obj if name.startswith(f"{family}.")]


def _knows(ctx: "Context", word: str, known: Sequence[str]) -> bool:
    if word not in known and not ctx.resilient_parsing:
        raise UsageError(f"unknown command '{ctx.command_path} {word}'", did_you_mean(word, known))
    return word in known


def _help_without_words(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help(), err=True)
        raise typer.Exit(UsageError.exit_code)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"compress {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Root,
    help="Make language models smaller, faster and cheaper, and prove it.",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    # Plain help pages, which do not wait for rich to be imported.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(commands.fixed)
app.add_typer(analysis.analyses)
app.add_typer(teaching.teaching)
for _family in FAMILIES:
    app.add_typer(
        typer.Typer(),
        name=_family,
        cls=Family,
        help=f"{_FAMILY_HELP[_family][0].upper()}{_FAMILY_HELP[_family][1:]}.",
        short_help=_FAMILY_HELP[_family],
        invoke_without_command=True,
        callback=_help_without_words,
    )


@app.callback()
def _root(
    ctx: typer.Context,
    _version: Annotated[
        bool,
        typer.Option(
            "-V", "--version", is_eager=True, callback=_show_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    _help_without_words(ctx)
    if ctx.invoked_subcommand not in (*FAMILIES, "run"):
        require_alone(f"compress {ctx.invoked_subcommand}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    ask_for_large_pages()
    try:
        result = get_command(app).main(args=words, prog_name="compress", standalone_mode=False)
        if result == failures.INTERRUPTED:
            # Typer makes this code of an interrupt, and says nothing of it.
            raise KeyboardInterrupt
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last stop before a traceback
        code = failures.show(error, debug=failures.debugging(words))
        if "--json" in words and code != failures.BROKEN_PIPE:
            failure = failures.explain(error)
            document = {"event": "error", "message": failure.message, "hint": failure.hint, "exit_code": code}
            typer.echo(json.dumps(document))
        return code
    return result if isinstance(result, int) else 0
